"""Benchmarks of matching models: retrieval in both directions, and pairs of two images and two texts.

A retrieval has two passes over the images. The first computes vectors of all images and texts and keeps their cosines
in a file. The second reranks by ITM: it reads each image together with the nearest texts in either direction. That pass
is a collection like any other, and can be resumed. The image encoder thus runs twice for each image, which is cheap
beside some hundred texts, and only the features of a few images are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2 import disk
from blip2.api.collect import CollectionRun, made, model_of, planned_run
from blip2.api.loading import as_matcher
from blip2.api.machines import Machines
from blip2.api.matcher import Matcher
from blip2.api.work import in_batches
from blip2.collection.record import Record
from blip2.collection.run import Outcome, Work
from blip2.data.cleaning import clean_caption
from blip2.errors import CollectionError, ImageError, option
from blip2.evaluate.benchmark import PAIR
from blip2.evaluate.compare import Scores, with_interval
from blip2.evaluate.examples import ANSWERS, Example, answers
from blip2.evaluate.report import Outputs
from blip2.scores.ranking import RECALLS, pairs, ranks
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.match import ImageFeatures

CHUNK = 256
"""Images for each write of cosines; an interrupted run loses no more."""
TEXT_TOKENS = 35
"""Tokens of a text with its special tokens, as the authors' library truncates it for retrieval."""
NOT_READ = -100.0
"""The score of a pair that was not reranked, as in the authors' library."""
DIGITS = 6
ITM, ITC = "read together", "by vectors"


@dataclass(frozen=True)
class Nearest:
    """All images, and the texts of all. ``cosines``: the file of their cosines with the images, ``float32[N, M]``.
    ``candidates``: the number of pairs to rerank, for each image and for each text."""

    images: tuple[str, ...]
    texts: tuple[str, ...]
    cosines: Path
    candidates: int

    def of_images(self) -> list[list[int]]:
        """For each image the indices of the texts that are reranked with it."""
        cosines_NM = torch.from_numpy(np.load(self.cosines))
        number_N, number_M = cosines_NM.shape
        texts_NK = cosines_NM.topk(min(self.candidates, number_M), dim=1).indices.tolist()
        found = [{*own} for own in texts_NK]
        for text, near in enumerate(cosines_NM.topk(min(self.candidates, number_N), dim=0).indices.T.tolist()):
            for image in near:
                found[image].add(text)
        return [sorted(own) for own in found]


def beginning(
    task: str, examples: Sequence[Example], rows: Path, folder: Path, candidates: int, **options: Any
) -> tuple[CollectionRun, Nearest | None]:
    """An evaluation that has been checked and can start; for a retrieval with the cosines that `see` has to compute
    before."""
    batch_size = options.pop("batch_size", None) or BATCH_SIZE
    judge, rest = model_of(as_matcher, options.pop("model", None) or "miniature-itm", options)
    machines = Machines.of(rest)
    facts = {"task": task, **judge.description, "candidates": candidates}
    where = {"key_column": "row", "image_column": "image", "format": "jsonl", "if_exists": "overwrite"}
    plan = planned_run(rows, folder / ANSWERS, {**rest, **where}, judge, facts, takes_text=False)
    if task == PAIR:
        return CollectionRun(plan, judge, _Loading(compared, (judge, batch_size)), batch_size, machines), None
    digest = blake2b(f"{judge.description}".encode() + rows.read_bytes(), digest_size=8).hexdigest()
    texts = tuple(clean_caption(text) for example in examples for text in example.wanted)
    images = tuple(os.path.join(rows.parent, example.image) for example in examples)
    nearest = Nearest(images, texts, folder / f"cosines-{digest}.npy", candidates)
    return CollectionRun(plan, judge, _Loading(reranked, (judge, nearest, batch_size)), batch_size, machines), nearest


@dataclass(frozen=True)
class _Loading:
    """`made` as a value that can be pickled."""

    make: Callable[..., Work]
    arguments: tuple[Any, ...]

    def __call__(self, get: Callable[[Any], Any]) -> Work:
        return made(self.make, self.arguments, get)


# ---- first pass ----


def see(run: CollectionRun, nearest: Nearest, on_progress: Callable[[int, int], None]) -> None:
    """Compute the cosines unless they exist; resumes an interrupted run. Raises CollectionError, OSError."""
    if nearest.cosines.exists():
        return
    matcher: Matcher = run.model.load_unchecked()
    reader = matcher.reader
    texts_ME = reader.embed_texts(_ids(matcher, nearest.texts), run.batch_size)
    images = nearest.images
    rows, parts = [], []
    for start in range(0, len(images), CHUNK):
        part = nearest.cosines.with_name(f"{nearest.cosines.stem}-{start:07}.npy")
        some = images[start : start + CHUNK]
        if not part.exists():
            seen = matcher.each_encoded(some, on_error="return", batch_size=run.batch_size)
            _save(part, torch.cat([_cosines(matcher, image, texts_ME) for image in seen]))
        parts.append(part)
        rows.append(np.load(part))
        on_progress(start + len(some), len(images))
    _save(nearest.cosines, torch.from_numpy(np.concatenate(rows)))
    for part in parts:
        part.unlink(missing_ok=True)


def _cosines(matcher: Matcher, image: ImageFeatures | ImageError, texts_ME: Tensor) -> Tensor:
    """``float32[1, M]``; the lowest value for an unreadable image."""
    if isinstance(image, ImageError):
        return torch.full((1, len(texts_ME)), -1.0)
    return matcher.reader.cosines([image], texts_ME).cpu()


def _save(path: Path, values: Tensor) -> None:
    file = BytesIO()
    np.save(file, values.numpy())
    disk.write_bytes(path, file.getvalue())


def _ids(matcher: Matcher, texts: Sequence[str]) -> list[list[int]]:
    return [[*row[: TEXT_TOKENS - 1], row[-1]] if len(row) > TEXT_TOKENS else row for row in matcher.reader.ids(texts)]


# ---- results of an image: scores with the name of their text ----


def reranked(matcher: Matcher, nearest: Nearest, batch_size: int) -> Work:
    """The ITM logit and the cosine of each candidate text, by its number."""
    if not nearest.cosines.exists():
        raise CollectionError(f"{nearest.cosines}: does not exist; evaluate with {option('restart')}")
    ids, near = _ids(matcher, nearest.texts), nearest.of_images()
    cosines_NM = np.load(nearest.cosines, mmap_mode="r")

    def read(images: Sequence[ImageFeatures], records: Sequence[Record]) -> list[Outcome]:
        return [one(image, int(record.key)) for image, record in zip(images, records, strict=True)]

    def one(image: ImageFeatures, number: int) -> Outcome:
        own = near[number]
        logits_C2 = matcher.reader.itm_logits([image], [ids[text] for text in own], batch_size)[0].float().cpu()
        scores = logits_C2[:, 1].numpy() + cosines_NM[number, own]
        return _outcome([str(text) for text in own], scores.tolist())

    return in_batches(matcher.frontend, read, batch_size)


def compared(matcher: Matcher, batch_size: int) -> Work:
    """The scores of each of a row's own texts, by ITM and by cosine."""

    def read(images: Sequence[ImageFeatures], records: Sequence[Record]) -> list[Outcome]:
        return [one(image, record.columns["captions"]) for image, record in zip(images, records, strict=True)]

    def one(image: ImageFeatures, texts: Sequence[str]) -> Outcome:
        ids = _ids(matcher, [clean_caption(text) for text in texts])
        found = matcher.reader.compare([image], ids, matcher.reader.embed_texts(ids, batch_size), batch_size)
        names = [f"{way} {number}" for way in (ITM, ITC) for number in range(len(texts))]
        return _outcome(names, [*found.score[0].tolist(), *found.itc_cosine[0].tolist()])

    return in_batches(matcher.frontend, read, batch_size)


def _outcome(names: Sequence[str], scores: Sequence[float]) -> Outcome:
    return Outcome([*names], [round(float(score), DIGITS) for score in scores], [0] * len(names))


# ---- scores ----


def scores_of_retrieval(
    examples: Sequence[Example], folder: Path, nearest: Nearest
) -> tuple[Scores, int]:
    """Recalls in percent: images that find one of their texts ("text R@1"), and texts that find their image ("image
    R@1"); and the number of unreadable images. Raises CollectionError."""
    rows = answers(folder, len(examples))
    cosines_NM = np.load(nearest.cosines)
    owner_M = [number for number, example in enumerate(examples) for _ in example.wanted]
    read_NM = np.full_like(cosines_NM, NOT_READ)
    for number, row in enumerate(rows):
        if row is not None:
            read_NM[number, [int(text) for text in row["captions"]]] = row["scores"]
    text_side, image_side = _only_candidates(read_NM, cosines_NM, nearest.candidates)
    totals: Scores = {}
    for name, of_images_NM, of_texts_NM in (("", text_side, image_side), (f", {ITC}", cosines_NM, cosines_NM)):
        before_N, _ = ranks(of_images_NM, owner_M)
        _, before_M = ranks(of_texts_NM, owner_M)
        for kind, before, groups in (("text", before_N, range(len(examples))), ("image", before_M, owner_M)):
            for recall in RECALLS:
                hits = (before < recall).astype(float).tolist()
                totals[f"{kind} R@{recall}{name}"] = with_interval(hits, [*groups])
    return totals, sum(row is None for row in rows)


def _only_candidates(read_NM: np.ndarray, cosines_NM: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all reranked pairs, the candidates of each direction."""
    cosines = torch.from_numpy(cosines_NM)
    sides = []
    for axis in (1, 0):
        near = cosines.topk(min(number, cosines.shape[axis]), dim=axis).indices.numpy()
        side = np.full_like(read_NM, NOT_READ)
        np.put_along_axis(side, near, np.take_along_axis(read_NM, near, axis), axis)
        sides.append(side)
    return sides[0], sides[1]


def scores_of_pairs(examples: Sequence[Example], folder: Path) -> tuple[Scores, int]:
    """Winoground's scores in percent. Raises CollectionError."""
    rows = answers(folder, len(examples))
    sides: dict[str, dict[int, dict[str, Any] | None]] = {}
    for example, row in zip(examples, rows, strict=True):
        name, _, side = str(example.id).rpartition("/")
        sides.setdefault(name, {})[int(side)] = row
    totals: Scores = {}
    for way, suffix in ((ITM, ""), (ITC, f", {ITC}")):
        each = [_right(own[0], own[1], way) for own in sides.values() if len(own) == 2]
        for place, name in enumerate(("text", "image", "group")):
            totals[f"{name}{suffix}"] = with_interval([float(right[place]) for right in each], [*range(len(each))])
    return totals, sum(row is None for row in rows)


def _right(first: dict[str, Any] | None, second: dict[str, Any] | None, way: str) -> tuple[bool, bool, bool]:
    if first is None or second is None:
        return False, False, False
    by_name = [dict(zip(row["captions"], row["scores"], strict=True)) for row in (first, second)]
    return pairs([[own[f"{way} {text}"] for text in (0, 1)] for own in by_name])


# ---- rows for the report ----


def found_first(examples: Sequence[Example], folder: Path, nearest: Nearest) -> Outputs:
    """For each image the best reranked text, and the reciprocal rank of its first own text, or 0 if none was reranked.
    Raises CollectionError."""
    ends = np.cumsum([len(example.wanted) for example in examples]).tolist()
    outputs: list[str | None] = []
    each: list[float | None] = []
    for number, (row, example) in enumerate(zip(answers(folder, len(examples)), examples, strict=True)):
        if row is None:
            outputs.append(None)
            each.append(0.0)
            continue
        ordered = sorted(zip(row["scores"], map(int, row["captions"]), strict=True), key=lambda one: (-one[0], one[1]))
        own = range(ends[number] - len(example.wanted), ends[number])
        place = next((place for place, (_, text) in enumerate(ordered, start=1) if text in own), None)
        outputs.append(nearest.texts[ordered[0][1]])
        each.append(0.0 if place is None else 1 / place)
    return Outputs(outputs, each, measure="the reciprocal rank of the first own text: 1, 1/2, 1/3 ...", label="found")


def chosen_of_pairs(examples: Sequence[Example], folder: Path) -> tuple[list[Example], Outputs]:
    """For each image the better of two texts by ITM; and the rows with the right text."""
    outputs: list[str | None] = []
    each: list[float | None] = []
    right = []
    for row, example in zip(answers(folder, len(examples)), examples, strict=True):
        side = int(str(example.id).rpartition("/")[2])
        right.append(replace(example, wanted=(example.wanted[side],)))
        scores = dict(zip(row["captions"], row["scores"], strict=True)) if row is not None else {}
        best = max((0, 1), key=lambda text: scores[f"{ITM} {text}"]) if scores else None
        outputs.append(None if best is None else example.wanted[best])
        each.append(float(best == side))
    return right, Outputs(outputs, each, label="chosen")
