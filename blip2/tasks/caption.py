"""Captions: what the language model says of an image when nothing, or only a beginning, is written for it."""

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
    """Describe each image, ``options.num_return`` times, the best first.

    A prompt is the beginning that the caption goes on from ("a photo of"); it is not part of what comes back.
    One prompt for all images or one for each; to an InstructBLIP it is an instruction (`text.caption_prompt`). Without
    ``options`` those of the model's authors are taken. Raises OptionError for numbers that do not pair up.
    """
    return speaker.answers(images, prompts(speaker, texts), options or speaker.defaults.caption, batch_size)


def prompts(speaker: Speaker, texts: Sequence[str]) -> list[str]:
    """What the captions go on from, as the model expects it."""
    return [caption_prompt(text, speaker.model.config.manner) for text in texts]
