"""What models make of a collection's pictures, as `collection.run` wants it: parts for loops of one's own.

    run(job, captions(blip, "", options, batch_size=16))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline
from blip2.collection.questions import QUESTION
from blip2.collection.record import Record
from blip2.collection.run import Outcome, Work
from blip2.encoded import EncodedImage
from blip2.errors import ImageError
from blip2.generation import GenerateOptions
from blip2.tasks.ask import ask, rank
from blip2.tasks.caption import caption
from blip2.tasks.match import ImageFeatures
from blip2.tasks.see import Eye
from blip2.tasks.speaker import Answer

Kept = TypeVar("Kept", EncodedImage, ImageFeatures)
SCORE_DIGITS, PROBABILITY_DIGITS = 4, 6
"""The same picture in another batch may have a score that differs in its last digits; what is written does not."""


def captions(
    blip: Pipeline, prompt: str, options: GenerateOptions, batch_size: int, matcher: Matcher | None = None
) -> Work:
    """Each picture described, ``options.num_return`` times; while the model works on a batch, the next is read.

    With a ``matcher`` the captions are ordered by how well it finds that they fit, and have its probabilities as
    scores.
    """

    def describe(pictures: Sequence[EncodedImage], records: Sequence[Record]) -> list[Outcome]:
        found = caption(blip.speaker, pictures, [prompt], options=options, batch_size=batch_size) if pictures else []
        outcomes = [outcome(answers) for answers in found]
        if matcher is None:
            return outcomes
        pictures_again: list[Any] = [record.picture for record in records]
        seen = matcher.eye.see(pictures_again, batch_size)
        return [
            by_match(matcher, features, told, prompt, batch_size) if isinstance(features, ImageFeatures) else told
            for features, told in zip(seen, outcomes, strict=True)
        ]

    return in_batches(blip.eye, describe, batch_size, keeps_pictures=matcher is not None)


def answers(
    blip: Pipeline, options: GenerateOptions, batch_size: int, choices: Sequence[str] | None = None
) -> Work:
    """The question of each record (`collection.questions`) answered; with ``choices``, these, the likeliest first, with
    their probabilities as scores. A picture that several records in a row have is seen once."""

    def answer(pictures: Sequence[EncodedImage], records: Sequence[Record]) -> list[Outcome]:
        asked = [str(record.columns[QUESTION]) for record in records]
        if not pictures:
            return []
        if choices is None:
            return [*map(outcome, ask(blip.speaker, pictures, asked, options=options, batch_size=batch_size))]
        ranked = rank(blip.speaker, pictures, asked, choices, batch_size=batch_size)
        return [_probable([(choice.text, choice.probability) for choice in row]) for row in ranked]

    return in_batches(blip.eye, answer, batch_size)


def matches(matcher: Matcher, texts: Sequence[str], template: str, top: int, candidates: int, batch_size: int) -> Work:
    """The ``top`` texts that fit each picture, the best first, with their probabilities as scores; see
    `Matcher.classify`."""

    def classify(pictures: Sequence[ImageFeatures], records: Sequence[Record]) -> list[Outcome]:
        found = matcher.each_classified(
            list(pictures), texts, top=top, template=template, candidates=candidates, batch_size=batch_size,
            on_error="return",
        )  # fmt: skip
        rows: list[Any] = [*found]
        return [_probable([(match.text, match.itm_probability) for match in row]) for row in rows]

    return in_batches(matcher.eye, classify, batch_size)


def in_batches(
    eye: Eye[Kept],
    task: Callable[[Sequence[Kept], Sequence[Record]], Sequence[Outcome]],
    batch_size: int,
    *,
    keeps_pictures: bool = False,
) -> Work:
    """Pictures through the eye, then in batches through the task; what is wrong with one stays in its place.

    ``keeps_pictures``: the task needs `Record.picture`, too.
    """

    def work(records: Iterator[Record]) -> Iterator[Outcome | ImageError]:
        with closing(_seen(eye, records, batch_size, keeps_pictures)) as pairs:
            while batch := list(islice(pairs, batch_size)):
                sound = [(record, kept) for record, kept in batch if not isinstance(kept, ImageError)]
                found = iter(task([kept for _, kept in sound], [record for record, _ in sound]))
                for _, kept in batch:
                    yield kept if isinstance(kept, ImageError) else next(found)

    return work


def _seen(eye: Eye[Kept], records: Iterator[Record], batch_size: int, keeps_pictures: bool) -> Any:
    """Each record with what is seen of its picture; one that comes several times in a row is seen once."""
    waiting: deque[tuple[Record, bool]] = deque()

    def pictures() -> Iterator[Any]:
        last: object = None
        for record in records:
            is_same = record.picture == last
            last = record.picture
            waiting.append((record if keeps_pictures else replace(record, picture=None), is_same))
            if not is_same:
                yield last

    kept: Any = None
    with closing(eye.see(pictures(), batch_size)) as found:
        for following in found:
            while waiting[0][1]:
                yield waiting.popleft()[0], kept
            kept = following
            yield waiting.popleft()[0], kept
    for record, _ in waiting:
        yield record, kept


def by_match(matcher: Matcher, features: ImageFeatures, told: Outcome, prompt: str, batch_size: int) -> Outcome:
    """The texts of an outcome ordered by how well they fit."""
    texts = [f"{prompt} {text}".strip() or "nothing" for text in told.captions]
    ids = matcher.reader.ids(texts)
    matched = matcher.reader.compare([features], ids, matcher.reader.embed_texts(ids, batch_size), batch_size)
    scores = [_rounded(score, PROBABILITY_DIGITS) for score in matched.itm_probability[0].tolist()]
    order = sorted(range(len(texts)), key=lambda place: -scores[place])
    captions, tokens = [told.captions[place] for place in order], [told.tokens[place] for place in order]
    return Outcome(captions, [scores[place] for place in order], tokens)


def outcome(answers: list[Answer]) -> Outcome:
    return Outcome(
        [answer.text for answer in answers],
        [_rounded(answer.score) for answer in answers],
        [len(answer.tokens) for answer in answers],
    )


def _probable(texts: Sequence[tuple[str, float]]) -> Outcome:
    """Texts that are given, with their probabilities."""
    scores = [_rounded(probability, PROBABILITY_DIGITS) for _, probability in texts]
    return Outcome([text for text, _ in texts], scores, [0] * len(texts))


def _rounded(score: float, digits: int = SCORE_DIGITS) -> float:
    return round(float(score), digits)
