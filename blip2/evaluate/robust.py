"""Robustness: how often answers change under variations that should not matter, on rows of your own.

Each row is asked unchanged, and once for each variation: a reworded question, the image as a JPEG of lower quality,
cropped at the edge, or stored rotated with the matching EXIF tag, and the same row in another batch. All of these form
one collection of rows, ``rows.jsonl``, which can be resumed like any other. The rotated image has the same pixels, and
other rows of a batch must have no influence, so these two must change nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.errors import CollectionError, ImageError, OptionError, option
from blip2.evaluate.compare import Scores, by_type, compared, with_interval
from blip2.evaluate.evaluation import MOST_SHOWN, SCORES, Evaluation, OnSeen
from blip2.evaluate.examples import Example, answers, read, texts_of
from blip2.evaluate.prepare import PREPARED, ROWS, made_before
from blip2.evaluate.report import Outputs, write
from blip2.image import RgbImage, as_jpeg, cut, load_image, turned
from blip2.scores import paired, wilson

ROBUSTNESS = "robustness"
TITLE = "how often answers change, on rows of your own"
IMAGES = "pictures"
"""Folder of the varied images, inside that of the evaluation."""
AS_IT_IS, COMPANY, ROTATION = "as it is", "other company", "EXIF rotation"
WITHOUT_CHANGE = (COMPANY, ROTATION)
"""Variations that give the model the same input."""
ORIENTATIONS = range(2, 9)


def _question_mark(question: str) -> str:
    return question.rstrip()[:-1].rstrip() if question.rstrip().endswith("?") else f"{question.rstrip()}?"


REWORDINGS: Mapping[str, Callable[[str], str]] = {
    "first letter": lambda question: question[:1].swapcase() + question[1:],
    "question mark": _question_mark,
    "in this picture": lambda question: f"in this picture, {question}",
    "please": lambda question: f"please answer: {question}",
}
"""For English questions, in addition to the rows' own rephrasings."""
STORED: Mapping[str, Callable[[RgbImage], bytes]] = {
    **{f"JPEG quality {quality}": partial(as_jpeg, quality=quality) for quality in (90, 50, 20)},
    **{f"middle {share:.0%}": partial(cut, share=share) for share in (0.95, 0.85)},
}


@dataclass(frozen=True)
class Varied:
    """``rows``: the file. ``origins``: for each of its rows the number of the original row; the first ``number`` rows
    are the originals. ``images``: for each original image the paths of its variants, and how to make them."""

    rows: Path
    number: int
    origins: Sequence[int]
    images: Mapping[str, Mapping[Path, Callable[[RgbImage], bytes]]]


def vary(data: Path, folder: Path, first: int | None) -> Varied:
    """Write the rows, and plan the images. ``first``: only this many rows. Raises CollectionError."""
    examples = read(data)[:first]
    made_before(folder / PREPARED, ROBUSTNESS)
    images: dict[str, dict[Path, Callable[[RgbImage], bytes]]] = {}
    varied: list[tuple[int, Example]] = []
    for number, example in enumerate(examples):
        if re.match(r"https?://", example.image, re.IGNORECASE):
            raise CollectionError(f"{data}: {example.image} is a URL; download the image, and name the file")
        is_file = example.image[:5].lower() != "data:"
        place = os.path.abspath(os.path.join(data.parent, example.image)) if is_file else example.image
        examples[number] = example = replace(example, image=place, kind=AS_IT_IS)
        varied += [(number, each) for each in _reworded(example)]
        if place not in images:
            images[place] = _images(place, folder / IMAGES, ORIENTATIONS[len(images) % len(ORIENTATIONS)])
    by_image: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        by_image.setdefault(example.image, []).append(number)
    for place, numbers in by_image.items():  # rows of an image are adjacent: it is encoded once
        for name, path in zip((*STORED, ROTATION), images[place], strict=True):
            varied += [(number, replace(examples[number], image=f"{IMAGES}/{path.name}", kind=name))
                       for number in numbers]  # fmt: skip
    company = [(number, replace(example, kind=COMPANY)) for number, example in enumerate(examples)]
    random.Random(0).shuffle(company)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = [*enumerate(examples), *varied, *company]
    text = "".join(json.dumps(_row(example, number), ensure_ascii=False) + "\n" for number, example in ordered)
    rows = folder / ROWS
    if not rows.exists() or rows.read_bytes() != text.encode("utf-8"):
        disk.write_text(rows, text)
    disk.write_text(folder / PREPARED, json.dumps({"made": {"benchmark": ROBUSTNESS, "of": str(data)}}) + "\n")
    return Varied(rows, len(examples), [number for number, _ in ordered], images)


def _reworded(example: Example) -> list[Example]:
    if example.question is None:
        return []
    found = [replace(example, question=change(example.question), kind=name) for name, change in REWORDINGS.items()]
    own = [replace(example, question=text, kind="rephrased") for text in example.rephrased]
    return [each for each in found + own if (each.question or "").strip()]


def _images(place: str, folder: Path, orientation: int) -> dict[Path, Callable[[RgbImage], bytes]]:
    """In the order of `STORED`, then the rotated one. Names depend on the image's content."""
    digest = disk.digest_of(place)[:16] or blake2b(place.encode("utf-8", "replace"), digest_size=8).hexdigest()
    made = {folder / f"{digest}-{_slug(name)}": change for name, change in STORED.items()}
    return made | {folder / f"{digest}-exif-{orientation}.png": partial(turned, orientation=orientation)}


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-") + (".jpg" if "JPEG" in name else ".png")


def _row(example: Example, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"image": example.image, "type": example.kind, "of": number}
    if example.question is None:
        return row | {"captions": [*example.wanted]}
    right = {"answers": [*example.wanted]} if example.are_people else {"answer": example.wanted[0]} \
        if example.wanted else {"unscored": True}  # fmt: skip
    return row | {"question": example.question} | right


@dataclass(frozen=True, kw_only=True)
class Robustness(Evaluation):
    """An evaluation whose scores are the shares of rows whose answers changed."""

    varied: Varied
    data: Path
    model: str

    def see(self, on_progress: OnSeen = lambda done, total: None) -> None:
        """Make the varied images that do not exist yet. An unreadable image has none, and its row is not counted.
        Raises CollectionError."""
        for done, (place, made) in enumerate(self.varied.images.items(), start=1):
            missing = {path: change for path, change in made.items() if not path.exists()}
            try:
                image = load_image(place) if missing else None
            except ImageError:
                continue
            for path, change in missing.items():
                if image is not None:
                    path.parent.mkdir(exist_ok=True)
                    disk.write_bytes(path, change(image))
            if missing and (done % 100 == 0 or done == len(self.varied.images)):
                on_progress(done, len(self.varied.images))

    def scores(self, against: Path | None = None) -> dict[str, Any]:
        """As in `Evaluation`: the share of changed answers for each variation, and the scores of each by type."""
        if against is not None:
            raise OptionError(f"{option('against')} cannot be used with {ROBUSTNESS}, which compares a model with "
                "itself")
        results = answers(self.folder, len(self.examples))
        texts, origins, number = texts_of(results), self.varied.origins, self.varied.number
        each = self._each(texts)
        counted = [place for place in range(number, len(texts)) if texts[origins[place]] is not None]
        places: dict[str, list[int]] = {}
        for place in counted:
            places.setdefault(self.examples[place].kind, []).append(place)
        differs = [texts[place] != texts[origin] for place, origin in enumerate(origins)]
        totals: Scores = {}
        for name, some in places.items():
            groups = [self.examples[origins[place]].image for place in some]
            totals[f"changed, {name}"] = _share([differs[place] for place in some], groups)
        wrong = {name: sum(differs[place] for place in places.get(name, ())) for name in WITHOUT_CHANGE}
        found: dict[str, Any] = {
            "title": f"{ROBUSTNESS}: {self.data.name}", "model": self.model, "rows": number,
            "failed": sum(text is None for text in texts[:number]), "scores": totals,
            "types": by_type(self.examples, each),
            "differences": [f"{name} changed {count} answers, but must change none; report it with the model and rows"
                            for name, count in wrong.items() if count],
        }  # fmt: skip
        sure = [row.get("score") if row is not None else None for row in results]
        ours = Outputs(texts, each, sure, "CIDEr" if self.examples[0].question is None else "accuracy")
        before = Outputs([texts[origin] for origin in origins], [each[origin] for origin in origins])
        found["against"] = self._against_original([place for place in counted if differs[place]], counted, ours, before)
        disk.write_text(self.folder / SCORES, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write(self.folder, self.rows, found, self.examples, ours, before)
        return found

    def _each(self, texts: Sequence[str | None]) -> list[float | None]:
        """The scores of each variation's rows among themselves, computed like those of the original rows."""
        each: list[float | None] = [None] * len(texts)
        places: dict[str, list[int]] = {}
        for place, example in enumerate(self.examples):
            places.setdefault(example.kind, []).append(place)
        for some in places.values():
            own = [self.examples[place] for place in some], [texts[place] for place in some]
            for place, score in zip(some, compared(*own, self.rule, java=False).each, strict=True):
                each[place] = score
        return each

    def _against_original(
        self, changed: Sequence[int], counted: Sequence[int], ours: Outputs, before: Outputs
    ) -> dict[str, Any]:
        pairs = [(now, was, self.examples[self.varied.origins[place]].image) for place in counted
                 if (now := ours.each[place]) is not None and (was := before.each[place]) is not None]  # fmt: skip
        found: dict[str, Any] = {
            "folder": "the rows as they are", "changed": len(changed),
            "better": sum(now > was for now, was, _ in pairs), "worse": sum(now < was for now, was, _ in pairs),
            "first_changed": [
                {"row": self.varied.origins[place], "type": self.examples[place].kind, "was": before.texts[place],
                 "is": ours.texts[place]}
                for place in changed[:MOST_SHOWN]
            ],
        }  # fmt: skip
        if pairs:
            scores, scores_before, images = zip(*pairs, strict=True)
            mean = sum(scores_before) / len(scores_before)
            found |= {"mean": mean, "p": paired(scores, scores_before, images)}
        return found


def _share(differs: Sequence[bool], images: Sequence[str]) -> dict[str, float]:
    """In percent. If none or all differ, resampling images gives no interval."""
    found = with_interval([*map(float, differs)], images) | {"rows": len(differs)}
    if len({*differs}) == 1:
        low, high = wilson(float(differs[0]), len({*images}))
        found |= {"low": 100 * low, "high": 100 * high}
    return found
