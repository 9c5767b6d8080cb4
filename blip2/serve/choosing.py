"""/ask with ``choices``: the most likely of the given answers."""

from __future__ import annotations

from dataclasses import dataclass

from blip2.encoded import EncodedImage
from blip2.serve.cache import Look
from blip2.serve.decoding import check_prompt
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.names import served_name
from blip2.serve.reading import Reading
from blip2.serve.schemas import Answered, AskRequest, Chosen, Decoding
from blip2.serve.service import Service
from blip2.serve.tickets import Steps
from blip2.tasks.ask import check_choices, ranking, scored
from blip2.tasks.speaker import Speaker, chunks
from blip2.text import LONG_TEXT

PORTION = 8
"""Number of choices compared between two steps of other work."""


@dataclass(frozen=True)
class Question:
    """A prompt about an image, and the possible answers."""

    look: Look[EncodedImage]
    text: str
    choices: list[str]
    client: str


async def choosing(service: Service, reading: Reading, body: AskRequest, text: str) -> Question:
    """The question of a request. Raises ApiError and OptionError."""
    choices = checked(body)
    speaker, limits = service.pipeline.speaker, service.limits
    await service.read_text(reading.client, text, lambda: check_prompt(speaker, text, limits))
    is_small = max(map(len, choices)) <= LONG_TEXT
    checks = (_checked(speaker, choice, limits) for choice in choices)
    await service.in_thread(reading.client, checks, is_small=is_small)
    return Question(await reading.look(0, service.worker.images), text, choices, reading.client)


async def chosen(service: Service, asked: Question) -> Answered:
    """The answer."""
    pipeline = service.pipeline

    def compare() -> Steps[list[float]]:
        [seen] = service.worker.images.see([asked.look])
        if isinstance(seen, Exception):
            raise seen
        scores: list[float] = []
        for some in chunks(asked.choices, PORTION):
            yield
            scores += scored(pipeline.speaker, [(seen, asked.text, choice) for choice in some])
        return scores

    scores = await service.compute(asked.client, compare())
    found = ranking(asked.choices, scores)
    return Answered(
        text=found[0].text,
        texts=[each.text for each in found],
        finish_reason="choice",
        model=served_name(pipeline.name),
        choices=[Chosen(text=each.text, score=each.score, probability=each.probability) for each in found],
    )


def checked(body: AskRequest) -> list[str]:
    """The choices. Raises ApiError for decoding options, which have no effect here."""
    assert body.choices is not None
    for name in Decoding.model_fields:
        if name != "called" and getattr(body, name) is not None:
            name = body.called.get(name, name)
            message = f"{name} has no effect with choices: nothing is generated; leave it out"
            raise ApiError(400, "invalid_value", message, param=name)
    return check_choices(body.choices)


def _checked(speaker: Speaker, choice: str, limits: Limits) -> str:
    number = len(speaker.tokenizer.encode(choice))
    if number > limits.max_new_tokens:
        message = f"a choice has {number} tokens; the limit is {limits.max_new_tokens}; shorten it"
        raise ApiError(400, "prompt_too_long", message, param="choices")
    return choice
