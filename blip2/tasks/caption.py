"""Captions: what the language model says of a picture when nothing, or only a beginning, is written for it."""

from __future__ import annotations

from collections.abc import Sequence

from blip2.encoded import EncodedImage
from blip2.generation import GenerateOptions
from blip2.tasks.defaults import BATCH_SIZE, CAPTION
from blip2.tasks.speaker import Answer, Speaker
from blip2.text import clean


def caption(
    speaker: Speaker,
    images: Sequence[EncodedImage],
    prompts: Sequence[str] = ("",),
    *,
    options: GenerateOptions = CAPTION,
    batch_size: int = BATCH_SIZE,
) -> list[list[Answer]]:
    """Describe each image, ``options.num_return`` times, the best first.

    A prompt is the beginning that the caption goes on from ("a photo of"); it is not part of what comes back.
    One prompt for all images or one for each. Raises OptionError for numbers that do not pair up.
    """
    return speaker.answers(images, [clean(prompt) for prompt in prompts], options, batch_size)
