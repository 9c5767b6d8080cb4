"""Captions: the text that the language model generates for an image alone, or after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from blip2.encoded import EncodedImage
from blip2.generation import GenerateOptions
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.speaker import Answer, Speaker
from blip2.text import caption_prompt


def caption(
    speaker: Speaker,
    images: Sequence[EncodedImage],
    texts: Sequence[str] = ("",),
    *,
    options: GenerateOptions | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[list[Answer]]:
    """Caption each image, ``options.num_return`` times, best first.

    The caption continues the prompt ("a photo of"), which is not part of the result. One prompt for all images or one
    for each; for an InstructBLIP it is an instruction (`text.caption_prompt`). Without ``options`` those of the
    model's authors apply. Raises OptionError for numbers that do not pair up.
    """
    return speaker.answers(images, prompts(speaker, texts), options or speaker.defaults.caption, batch_size)


def prompts(speaker: Speaker, texts: Sequence[str]) -> list[str]:
    """The prompts in the form that the model expects."""
    return [caption_prompt(text, speaker.model.config.manner) for text in texts]
