"""The work of models on a collection's images, for `collection.run`; also for loops of your own.

    run(job, captions(blip, "", {"num_beams": 3}, batch_size=16))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, TypeVar

from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline
from blip2.collection.feed import Feed
from blip2.collection.questions import QUESTION
from blip2.collection.record import Record
from blip2.collection.run import Outcome, Work
from blip2.encoded import EncodedImage
from blip2.errors import ImageError
from blip2.tasks.ask import ask, rank, rank_each
from blip2.tasks.caption import caption
from blip2.tasks.defaults import BATCH_SIZE, merged
from blip2.tasks.match import ImageFeatures
from blip2.tasks.see import ImageFrontend
from blip2.tasks.speaker import Answer

Kept = TypeVar("Kept", EncodedImage, ImageFeatures)
SCORE_DIGITS = 4
"""Digits of scores and probabilities. In another batch, the score of the same image may differ by a few millionths;
after rounding only those near the edge between two numbers of four digits differ."""


def captions(
    blip: Pipeline, prompt: str, given: Mapping[str, Any], batch_size: int, matcher: Matcher | None = None
) -> Work:
    """Captions of each image, ``num_return`` each. The next batch is read while the model processes one.

    ``given``: options that replace the model's own (`tasks.defaults.merged`). With a ``matcher`` the captions are
    sorted by its match probabilities, which become their scores.
    """
    options = merged(blip.speaker.defaults.caption, given)
    begun = "" if blip.speaker.model.config.reads_prompt else prompt  # an instruction is not part of the caption

    def describe(images: Sequence[EncodedImage], records: Sequence[Record]) -> list[Outcome]:
        found = caption(blip.speaker, images, [prompt], options=options, batch_size=batch_size) if images else []
        outcomes = [outcome(answers) for answers in found]
        if matcher is None:
            return outcomes
        images_again: list[Any] = [record.image for record in records]
        seen = matcher.frontend.see(images_again, batch_size)
        return [
            by_match(matcher, features, of_image, begun) if isinstance(features, ImageFeatures) else of_image
            for features, of_image in zip(seen, outcomes, strict=True)
        ]

    return in_batches(blip.frontend, describe, batch_size, keeps_images=matcher is not None)


def answers(
    blip: Pipeline,
    given: Mapping[str, Any],
    batch_size: int,
    choices: Sequence[str] | None = None,
    wording: str = "",
    choices_column: str = "",
) -> Work:
    """Answers to the question of each record (`collection.questions`); ``given`` as in `captions`. With ``choices``:
    the choices, most likely first, with their probabilities as scores. ``choices_column``: the record's own choices.
    ``wording``: as in `ask`. An image in several consecutive records is encoded once."""
    options = merged(blip.speaker.defaults.ask, given)

    def answer(images: Sequence[EncodedImage], records: Sequence[Record]) -> list[Outcome]:
        asked = [str(record.columns[QUESTION]) for record in records]
        if not images:
            return []
        if choices is None and not choices_column:
            found = ask(blip.speaker, images, asked, options=options, batch_size=batch_size, wording=wording)
            return [*map(outcome, found)]
        if choices is None:
            own = [record.columns[choices_column] for record in records]
            ranked = rank_each(blip.speaker, images, asked, own, batch_size=batch_size, wording=wording)
        else:
            ranked = rank(blip.speaker, images, asked, choices, batch_size=batch_size)
        return [probable([(choice.text, choice.probability) for choice in row]) for row in ranked]

    return in_batches(blip.frontend, answer, batch_size)


def matches(matcher: Matcher, texts: Sequence[str], template: str, top: int, candidates: int, batch_size: int) -> Work:
    """The ``top`` texts for each image, best first, with their probabilities as scores; see `Matcher.classify`.
    ``batch_size``: number of images per batch; the batches of texts have a fixed size, so that the scores do not depend
    on it."""

    def classify(images: Sequence[ImageFeatures], records: Sequence[Record]) -> list[Outcome]:
        found = matcher.each_classified(
            list(images), texts, top=top, template=template, candidates=candidates, batch_size=BATCH_SIZE,
            on_error="return",
        )  # fmt: skip
        rows: list[Any] = [*found]
        return [probable([(match.text, match.itm_probability) for match in row]) for row in rows]

    return in_batches(matcher.frontend, classify, batch_size)


def in_batches(
    frontend: ImageFrontend[Kept],
    task: Callable[[Sequence[Kept], Sequence[Record]], Sequence[Outcome]],
    batch_size: int,
    *,
    keeps_images: bool = False,
) -> Work:
    """Encode images, then run the task on batches; an error stays in its image's place.

    ``keeps_images``: the task also needs `Record.image`.
    """

    def work(records: Iterator[Record]) -> Iterator[Outcome | ImageError]:
        batches: deque[list[tuple[Record, bool]]] = deque()  # with whether the record before has the same image
        with closing(frontend.see_batches(_images(records, batch_size, keeps_images, batches))) as seen:
            for first in seen:
                pairs: list[tuple[Record, Any]] = []
                for record, is_same in batches.popleft():
                    kept = pairs[-1][1] if is_same else next(seen) if pairs else first
                    pairs.append((record, kept))
                sound = [(record, kept) for record, kept in pairs if not isinstance(kept, ImageError)]
                found = iter(task([kept for _, kept in sound], [record for record, _ in sound]))
                for _, kept in pairs:
                    yield kept if isinstance(kept, ImageError) else next(found)

    return work


def _images(
    records: Iterator[Record], batch_size: int, keeps_images: bool, batches: deque[list[tuple[Record, bool]]]
) -> Iterator[list[Any]]:
    """The images of each batch without consecutive repetitions; ``batches`` gets the records.

    If `run` gives the records, it decides where a batch ends: a resumed run has the same batches as before, so that
    scores are identical to the last digit.
    """
    take = records.batch if isinstance(records, Feed) else lambda size: list(islice(records, size))
    while some := take(batch_size):
        are_same = [False, *(one.image == other.image for one, other in pairwise(some))]
        batches.append([
            (record if keeps_images else replace(record, image=None), is_same)
            for record, is_same in zip(some, are_same, strict=True)
        ])  # fmt: skip
        yield [record.image for record, is_same in zip(some, are_same, strict=True) if not is_same]


def by_match(matcher: Matcher, features: ImageFeatures, outcome: Outcome, prompt: str) -> Outcome:
    """The texts of an outcome, sorted by match probability; equal ones keep their order."""
    texts = [f"{prompt} {text}".strip() or "nothing" for text in outcome.captions]
    ids = matcher.reader.ids(texts)
    matched = matcher.reader.compare([features], ids, matcher.reader.embed_texts(ids))
    scores = [_rounded(score) for score in matched.itm_probability[0].tolist()]
    order = sorted(range(len(texts)), key=lambda place: -scores[place])
    captions, tokens = [outcome.captions[place] for place in order], [outcome.tokens[place] for place in order]
    return Outcome(captions, [scores[place] for place in order], tokens)


def outcome(answers: list[Answer]) -> Outcome:
    return Outcome(
        [answer.text for answer in answers],
        [_rounded(answer.score) for answer in answers],
        [len(answer.tokens) for answer in answers],
    )


def probable(texts: Sequence[tuple[str, float]]) -> Outcome:
    """Given texts with their probabilities."""
    scores = [_rounded(probability) for _, probability in texts]
    return Outcome([text for text, _ in texts], scores, [0] * len(texts))


def _rounded(score: float) -> float:
    return round(float(score), SCORE_DIGITS)
