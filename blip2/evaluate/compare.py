"""Compares outputs with references: a score for each row, and total scores by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blip2.evaluate.examples import Example
from blip2.scores import bleu, cider, interval, rouge_l, vqa_accuracy
from blip2.scores.answers import normalised
from blip2.scores.java import by_java
from blip2.scores.tokens import tokens

Scores = dict[str, dict[str, float]]
"""By name, in percent: "score", and for means the 95 % interval "low" to "high"."""


@dataclass(frozen=True)
class Compared:
    """``each``: the score of each row, None for a row that is not scored. ``not_computed``: reasons, by score name."""

    each: Sequence[float | None]
    totals: Scores
    not_computed: dict[str, str] = field(default_factory=dict)


def compared(
    examples: Sequence[Example], outputs: Sequence[str | None], rule: str, *,
    apart: bool = False, java: bool = True, other: str = "",
) -> Compared:  # fmt: skip
    """``other``: a second rule for answers. ``apart``: compute the CIDEr of each type separately, as the server of
    NoCaps does. ``java``: whether to compute METEOR and SPICE."""
    if examples[0].question is None:
        return _captions(examples, outputs, apart, java)
    return _answers(examples, outputs, rule, other)


def by_type(examples: Sequence[Example], each: Sequence[float | None]) -> Scores:
    found = {}
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if example.kind and each[place] is not None:
            places.setdefault(example.kind, []).append(place)
    for kind, some in sorted(places.items()):
        scores = [score for place in some if (score := each[place]) is not None]
        found[kind] = with_interval(scores, [examples[place].image for place in some]) | {"rows": len(some)}
    return found


def with_interval(scores: Sequence[float], images: Sequence[object]) -> dict[str, float]:
    """In percent."""
    low, high = interval(scores, images)
    return {"score": 100 * sum(scores) / len(scores), "low": 100 * low, "high": 100 * high}


def _captions(examples: Sequence[Example], outputs: Sequence[str | None], apart: bool, java: bool) -> Compared:
    """Scores of images: all rows of an image together are its references."""
    texts = tokens([text or "" for text in outputs])
    flat = iter(tokens([text for example in examples for text in example.wanted]))
    references = [[next(flat) for _ in example.wanted] for example in examples]
    each, images = cider(texts, references), [example.image for example in examples]
    rouge = rouge_l(texts, references)
    totals: Scores = {f"BLEU-{n}": _only(100 * score) for n, score in enumerate(bleu(texts, references), start=1)}
    totals |= {"ROUGE-L": with_interval(rouge, images), "CIDEr": with_interval(each, images)}
    computed, missing = by_java(texts, references) if java else ({}, {})
    totals |= {name: _only(100 * score) for name, score in computed.items()}
    for kind in sorted({example.kind for example in examples} - {""}) if apart else ():
        own = [place for place, example in enumerate(examples) if example.kind == kind]
        scores = cider([texts[place] for place in own], [references[place] for place in own])
        totals[f"{kind} CIDEr"] = with_interval(scores, [images[place] for place in own]) | {"rows": len(own)}
    return Compared(each, totals, missing)


def _answers(examples: Sequence[Example], outputs: Sequence[str | None], rule: str, other: str) -> Compared:
    each = _by_rule(examples, outputs, rule)
    counted = [place for place, score in enumerate(each) if score is not None]
    if not counted:
        return Compared(each, {})
    images = [examples[place].image for place in counted]

    def mean(scores: Sequence[float | None]) -> dict[str, float]:
        return with_interval([scores[place] or 0.0 for place in counted], images)

    totals = {"accuracy": mean(each)}
    if other:
        totals[f"accuracy, rule {other}"] = mean(_by_rule(examples, outputs, other))
    return Compared(each, totals)


def _by_rule(examples: Sequence[Example], outputs: Sequence[str | None], rule: str) -> list[float | None]:
    """A single reference answer is compared by exact match, or by the rule of LAVIS (its GQATask) like answers of
    people."""
    plain: Callable[[str], str] = normalised if rule == "lavis" else str
    each: list[float | None] = []
    for example, text in zip(examples, outputs, strict=True):
        if not example.wanted:
            each.append(None)
        elif text is None:
            each.append(0.0)
        elif example.are_people:
            each.append(vqa_accuracy(text, example.wanted, rule))
        else:
            each.append(float(plain(text) == plain(example.wanted[0])))
    return each


def _only(score: float) -> dict[str, float]:
    return {"score": score}
