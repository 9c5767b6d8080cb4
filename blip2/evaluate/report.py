"""The page of an evaluation, ``report.html``: scores, the worst and the best rows, and a comparison with another model.

It is a single file without external resources; small images are embedded.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.collection.page import image_html, page
from blip2.evaluate.examples import Example

REPORT = "report.html"
THUMBNAIL_PX = 240
MOST_ROWS = 12
"""Rows in each part of the page."""
MOST_REFERENCES = 5
LONGEST = 400
"""Largest number of characters of a text."""

STYLE = """
body { max-width: 76rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h2 { margin: 2rem 0 .25rem; font-size: 1.1rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
ul { margin: .25rem 0; padding-left: 1.2rem; }
.dim, small { color: var(--dim); font-size: .875rem; }
.wrong { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; max-width: 56rem; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: normal; font-size: .875rem; }
td:first-child { white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.bar { width: 40%; min-width: 8rem; vertical-align: middle; }
.bar div { position: relative; height: .8rem; background: var(--line); border-radius: .2rem; }
.bar div span { position: absolute; inset: 0 auto 0 0; border-radius: .2rem;
  background: color-mix(in srgb, var(--front) 45%, var(--line)); }
.bar div i { position: absolute; top: calc(50% - 1px); height: 2px; background: var(--bad); }
main { display: grid; gap: .75rem; margin-top: .5rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  overflow-wrap: anywhere; }
img { display: block; max-width: 100%; max-height: 12rem; margin: 0 auto .5rem; }
figure small { display: block; }
"""


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model. ``each``: scores, None for a row that is not scored. ``sure``: the model's score of its
    own answer, None if not kept. ``measure``: the kind of score. ``label``: label of a text."""

    texts: Sequence[str | None]
    each: Sequence[float | None]
    sure: Sequence[float | None] = ()
    measure: str = "accuracy"
    label: str = "output"


@dataclass(frozen=True)
class _Row:
    """A row to show, with the output of another model (``before``)."""

    number: int
    score: float | None
    before: str | None = None
    score_before: float | None = None
    sure: float | None = None


def write(
    folder: Path, rows: Path, found: Mapping[str, Any], examples: Sequence[Example], ours: Outputs,
    theirs: Outputs | None,
) -> Path:
    """Write the page to ``folder`` atomically. ``found``: the content of scores.json. ``rows``: the file of the rows,
    whose folder has their images. ``theirs``: outputs of the other model. Raises OSError."""
    title = escape(str(found.get("title") or rows.name))
    shown = _Shown(rows.parent, examples, ours)
    parts = [*shown.parts(), *shown.compared(found, theirs)]
    body = "\n".join([_head(found, title), _scores(found), _types(found), *parts])
    path = folder / REPORT
    disk.write_text(path, page(f"{title} - blip2 evaluate", STYLE, body))
    return path


# ---- scores ----


def _head(found: Mapping[str, Any], title: str) -> str:
    items = [f"{found['rows']:,} rows"]
    items += [f"{found['failed']:,} could not be read and count as wrong"] if found["failed"] else []
    items += [str(found["model"])] if "model" in found else []
    items += [f"protocol {found['protocol']}"] if "protocol" in found else []
    items += [f"rule {found['rule']}"] if "rule" in found else []
    return f'<header><h1>{title}</h1>\n<p class="dim">{escape("; ".join(items))}</p></header>'


def _scores(found: Mapping[str, Any]) -> str:
    published: Mapping[str, Mapping[str, float]] = found.get("published", {}).get("scores", {})
    scores = found["scores"]
    if not scores:
        return "<h2>Scores</h2>\n<p>None: the right answers are not published; the file goes to the server.</p>"
    heads = "".join(f'<th class="number">published, {escape(name.removeprefix("Salesforce/"))}' for name in published)
    lines = []
    for name, score in scores.items():
        beside = "".join(_number(each.get(name)) for each in published.values())
        lines.append(f"<tr><td>{escape(name)}{_number(score['score'])}{_interval(score)}{beside}")
    table = f'<tr><th>score<th class="number">%<th class="number">95 % interval{heads}\n' + "\n".join(lines)
    notes = [f"published: {found['published']['source']}"] if published else []
    notes += [f"differs: {each}" for each in found.get("differences", ())]
    notes += [f"{name}: not computed; {reason}" for name, reason in found.get("not_computed", {}).items()]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    items = f'\n<ul class="dim">{listed}</ul>' if notes else ""
    return f'<h2>Scores</h2>\n<div class="wide"><table>{table}</table></div>{items}'


def _types(found: Mapping[str, Any]) -> str:
    """A bar for each type of question, with its interval as a line."""
    if not found["types"]:
        return ""
    top = max(100.0, *(score["high"] for score in found["types"].values()))
    lines = []
    for name, score in found["types"].items():
        left, width = 100 * score["low"] / top, 100 * (score["high"] - score["low"]) / top
        bar = (f'<div><span style="width:{100 * score["score"] / top:.2f}%"></span>'
               f'<i style="left:{left:.2f}%;width:{width:.2f}%"></i></div>')  # fmt: skip
        lines.append(f'<tr><td>{escape(name)}<td class="bar">{bar}{_number(score["score"])}{_interval(score)}'
                     f'<td class="number">{score["rows"]:,}')  # fmt: skip
    heads = '<th>type<th><th class="number">%<th class="number">95 % interval<th class="number">rows'
    return f'<h2>By type</h2>\n<div class="wide"><table><tr>{heads}\n' + "\n".join(lines) + "</table></div>"


def _number(value: float | None) -> str:
    return f'<td class="number">{"" if value is None else f"{value:.2f}"}'


def _interval(score: Mapping[str, float]) -> str:
    return f'<td class="number">{score["low"]:.2f} to {score["high"]:.2f}' if "low" in score else "<td>"


# ---- rows ----


class _Shown:
    """The parts of the page with images."""

    def __init__(self, folder: Path, examples: Sequence[Example], ours: Outputs) -> None:
        self._folder, self._examples, self._ours = folder, examples, ours
        self._images: dict[str, str] = {}

    def parts(self) -> Iterator[str]:
        """The worst rows, the best rows, and confident mistakes."""
        scored = [
            (score, _Row(number, score, sure=self._sure(number)))
            for number, score in enumerate(self._ours.each) if score is not None
        ]  # fmt: skip
        if not scored:
            return
        by = f"By {self._ours.measure}."
        is_endless = self._ours.measure == "CIDEr"
        worst = self._chosen((score, row) for score, row in scored if is_endless or score < 1)
        yield self._part("Worst", by, worst, "No row is below the full score.")
        shown = {row.number for row in worst}
        best = self._chosen((-score, row) for score, row in scored if score > 0 and row.number not in shown)
        yield self._part("Best", by, best, "No other row has a score above 0.")
        if self._ours.measure != "accuracy":
            return
        wrong = [row for score, row in scored if score == 0 and self._ours.texts[row.number] is not None]
        sure = [(-row.sure, row) for row in wrong if row.sure is not None]
        why = "No answer is wrong." if not wrong else "The confidence was not kept."
        yield self._part("Confident mistakes", "Wrong answers, the most confident first, by the model's score of its "
            "own answer.",
                         self._chosen(sure), why)  # fmt: skip

    def compared(self, found: Mapping[str, Any], theirs: Outputs | None) -> Iterator[str]:
        """Rows whose output differs from the other model's, and whether it is better."""
        if theirs is None:
            return
        other = found["against"]
        items = f"{other['changed']:,} rows changed, {other['better']:,} better, {other['worse']:,} worse"
        items += f"; the mean was {100 * other['mean']:.2f} %; p = {other['p']:.3g}" if "p" in other else ""
        yield (
            f"<h2>Compared with {escape(other['folder'])}</h2>\n<p>{items}.</p>"
            '<p class="dim">p: probability of a difference at least as large if neither is better.</p>'
        )
        better: list[tuple[float, _Row]] = []
        worse: list[tuple[float, _Row]] = []
        same: list[tuple[float, _Row]] = []
        for number, (score, score_before) in enumerate(zip(self._ours.each, theirs.each, strict=True)):
            before = theirs.texts[number]
            if before == self._ours.texts[number]:
                continue
            row = _Row(number, score, before or "(no answer)", score_before, self._sure(number))
            change = score - score_before if score is not None and score_before is not None else 0.0
            kind = better if change > 0 else worse if change < 0 else same
            kind.append((-abs(change), row))
        for name, rows in (("Better", better), ("Worse", worse), ("Changed, neither better nor worse", same)):
            yield self._part(name, f"{len(rows):,} rows.", self._chosen(rows), "None.")

    def _sure(self, number: int) -> float | None:
        return self._ours.sure[number] if self._ours.sure else None

    def _chosen(self, rows: Iterable[tuple[float, _Row]]) -> list[_Row]:
        """The lowest values first; among equal ones, different images first and unreadable ones last."""
        seen: Counter[tuple[float, str]] = Counter()
        ordered = []
        for value, row in rows:
            place = (value, self._examples[row.number].image)
            is_unread = self._ours.texts[row.number] is None
            ordered.append((value, is_unread, seen[place], row.number, row))
            seen[place] += 1
        return [row for *_, row in sorted(ordered, key=lambda each: each[:4])[:MOST_ROWS]]

    def _part(self, title: str, about: str, rows: Sequence[_Row], none: str) -> str:
        if not rows:
            return f'<h2>{title}</h2>\n<p class="dim">{none}</p>'
        cards = "\n".join(map(self._card, rows))
        return f'<h2>{title}</h2>\n<p class="dim">{escape(about)}</p>\n<main>\n{cards}\n</main>'

    def _card(self, row: _Row) -> str:
        example, output = self._examples[row.number], self._ours.texts[row.number]
        lines = [f'<p class="dim">{_text(example.question)}</p>'] if example.question is not None else []
        if row.before is not None:
            lines.append(f"<p>before: {_text(row.before)}</p>")
        label = self._ours.label if row.before is None else "now"
        lines.append(f"<p>{label}: <b>{_text(output)}</b></p>" if output is not None
                     else '<p class="wrong">the image could not be read</p>')  # fmt: skip
        lines.append(f'<p class="dim">reference: {self._references(example)}</p>')
        items = [self._scored(row), f"row {row.number + 1}", example.kind, _name(example.image)]
        about = escape(", ".join(filter(None, items)))
        return f"<figure>{self._image(example.image)}{''.join(lines)}<small>{about}</small></figure>"

    @staticmethod
    def _scored(row: _Row) -> str:
        before = f"{100 * row.score_before:.0f}, now " if row.score_before is not None else ""
        sure = f", the model's own score {row.sure:.4g}" if row.sure is not None else ""
        score = "not scored" if row.score is None else f"score {before}{100 * row.score:.0f}"
        return score + sure

    @staticmethod
    def _references(example: Example) -> str:
        counted = Counter(example.wanted).most_common(MOST_REFERENCES)
        items = [_text(text) + (f" ({count})" if count > 1 else "") for text, count in counted]
        more = len(set(example.wanted)) - len(counted)
        return "; ".join(items) + (f"; and {more} more" if more else "")

    def _image(self, place: str) -> str:
        if place not in self._images:
            self._images[place] = _drawn(place, self._folder)
        return self._images[place]


def _drawn(place: str, folder: Path) -> str:
    """No image is downloaded for a page."""
    if re.match(r"data:", place, re.IGNORECASE):
        return image_html(place, THUMBNAIL_PX)
    if re.match(r"https?://", place, re.IGNORECASE):
        return f'<p class="dim">not downloaded: {escape(place)}</p>'
    return image_html(os.path.join(folder, place), THUMBNAIL_PX)


def _name(place: str) -> str:
    return "" if place[:5].lower() == "data:" else os.path.basename(place)


def _text(text: str | None) -> str:
    text = text or ""
    return escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")
