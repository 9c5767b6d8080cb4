"""What a model makes of a collection's pictures, as `collection.run` wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

from blip2.api.pipeline import Pipeline
from blip2.collection.record import Record
from blip2.collection.run import Outcome, Work
from blip2.errors import ImageError
from blip2.generation import GenerateOptions
from blip2.tasks.caption import caption
from blip2.tasks.speaker import Answer


def captions(blip: Pipeline, prompt: str, options: GenerateOptions, batch_size: int) -> Work:
    """Each picture described, ``options.num_return`` times; while the model works on a batch, the next is read."""

    def work(records: Iterator[Record]) -> Iterator[Outcome | ImageError]:
        pictures: Iterator[Any] = (record.picture for record in records)
        with closing(blip.eye.see(pictures, batch_size)) as seen:
            while batch := list(islice(seen, batch_size)):
                sound = [image for image in batch if not isinstance(image, ImageError)]
                found = iter(caption(blip.speaker, sound, [prompt], options=options, batch_size=batch_size))
                for image in batch:
                    yield image if isinstance(image, ImageError) else outcome(next(found))

    return work


def outcome(answers: list[Answer]) -> Outcome:
    return Outcome(
        [answer.text for answer in answers],
        [answer.score for answer in answers],
        [len(answer.tokens) for answer in answers],
    )
