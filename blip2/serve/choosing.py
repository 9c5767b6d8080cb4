"""/ask with ``choices``: which of the given answers is the likeliest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from blip2.encoded import EncodedImage
from blip2.serve.cache import Look
from blip2.serve.decoding import check_prompt
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.names import served_name
from blip2.serve.reading import Reading
from blip2.serve.schemas import Answered, AskRequest, Chosen, Decoding
from blip2.serve.service import Service
from blip2.tasks.ask import check_choices, ranking, scored
from blip2.tasks.speaker import Speaker, chunks

PORTION = 8
"""Choices that are compared between two steps of what else is running."""


@dataclass(frozen=True)
class Question:
    """A prompt about a picture, and the answers that it may have."""

    look: Look[EncodedImage]
    text: str
    choices: list[str]


async def choosing(service: Service, reading: Reading, body: AskRequest, text: str) -> Question:
    """What is asked. Raises ApiError and OptionError."""
    choices = checked(body)
    await asyncio.to_thread(_check, service.pipeline.speaker, text, choices, service.limits)
    return Question(await reading.look(0, service.worker.images), text, choices)


async def chosen(service: Service, asked: Question) -> Answered:
    """The answer."""
    pipeline = service.pipeline

    def portion(some: Sequence[str]) -> list[float]:
        [seen] = service.worker.images.see([asked.look])
        if isinstance(seen, Exception):
            raise seen
        return scored(pipeline.speaker, [(seen, asked.text, choice) for choice in some])

    scores: list[float] = []
    for some in chunks(asked.choices, PORTION):
        scores += await service.compute(partial(portion, some))
    found = ranking(asked.choices, scores)
    return Answered(
        text=found[0].text,
        texts=[each.text for each in found],
        finish_reason="choice",
        model=served_name(pipeline.name),
        choices=[Chosen(text=each.text, score=each.score, probability=each.probability) for each in found],
    )


def checked(body: AskRequest) -> list[str]:
    """The choices. Raises ApiError for what decides how answers are written: none is."""
    assert body.choices is not None
    for name in Decoding.model_fields:
        if name != "called" and getattr(body, name) is not None:
            name = body.called.get(name, name)
            message = f"{name} means nothing with choices: no answer is written; leave it out"
            raise ApiError(400, "invalid_value", message, param=name)
    return check_choices(body.choices)


def _check(speaker: Speaker, text: str, choices: list[str], limits: Limits) -> None:
    check_prompt(speaker, text, limits)
    for choice in choices:
        number = len(speaker.tokenizer.encode(choice))
        if number > limits.max_new_tokens:
            message = f"a choice has {number} tokens; at most {limits.max_new_tokens} are compared; shorten it"
            raise ApiError(400, "prompt_too_long", message, param="choices")
