"""Bringing an index up to date with folders: encode what is new or changed, forget what is gone, lose nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.api import Matcher, Pipeline
from blip2.checkpoint.names import BUNDLED
from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.disk import Stamp, digest_since, stamp_of
from blip2.encoded import EncodedImage
from blip2.errors import ImageError, IndexFileError, OptionError, option
from blip2.image import DEFAULT_READING, PIXELS_VERSION, Reading
from blip2.index.file import KINDS, Origin, Picture, Stored, crc32_of, read
from blip2.index.folders import Collection
from blip2.index.unfinished import Unfinished, held
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.match import ImageFeatures
from blip2.tasks.speaker import check_batch_size

SHARD_PICTURES = 256
SHARD_SECONDS = 30.0
"""After so many images, or so long, what was done is kept: that is what a killed run may lose."""
DEFAULT_MODELS = {"search": "miniature-itm", "ask": "miniature"}

Model = Matcher | Pipeline
Load = Callable[[str, str], Model]
"""A model by its name, for a kind of index."""


@dataclass(frozen=True)
class Changes:
    """What an update did, in images; ``total``: how many the index holds now."""

    new: int
    changed: int
    gone: int
    unreadable: int
    total: int

    def __str__(self) -> str:
        told = f"{self.new:,} new, {self.changed:,} changed, {self.gone:,} gone"
        return f"{told}, {self.unreadable:,} could not be read" if self.unreadable else told


class Row(NamedTuple):
    """Where an image's vectors are: an open file, the row in it, and what that says of the image."""

    stored: Stored
    number: int
    picture: Picture


def update(
    path: str | os.PathLike[str],
    places: Iterable[str | os.PathLike[str]],
    load: Load,
    *,
    kind: str | None = None,
    model: str | None = None,
    batch_size: int = BATCH_SIZE,
    recursive: bool = True,
    exclude: Iterable[str] = (),
    rows: Mapping[str, Any] | None = None,
    reading: Reading = DEFAULT_READING,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_problem: Callable[[str], None] = lambda message: None,
    on_note: Callable[[str], None] = lambda message: None,
) -> Changes:
    """Make the index of the images in folders (and single files), or bring it up to date.

    Images whose size and times of change are known are not looked at again, and where these differ, but the content
    does not, not encoded again; those of folders that are not named stay as they are. ``kind``: "search" or "ask", by
    default the index's own, or "search". ``load`` gives the model of a name for that kind, and is called only if there
    is work for it; ``model`` is the name, by default the index's own.
    ``recursive`` and ``exclude``: see `data.folders.find_in`; what they leave out of a folder is forgotten, too.
    ``rows``: places may be files of rows that name images (JSON lines, CSV, parquet, COCO), and this how they are
    read: ``image_column``, ``images`` and ``split`` as `collection.sources.open_source` has them.
    ``reading``: which images are read, as the model's own.
    ``on_progress``: images done and in all. ``on_problem``: a line for each image or folder that cannot be read,
    which is left out; what the index knows of a folder stays. ``on_note``: a line that counts what is no image.

    Raises IndexFileError (the index is then as it was, and what was encoded is kept for the next run) and OptionError.
    """
    path = Path(os.path.realpath(path))
    check_batch_size(batch_size)
    if kind not in (None, *KINDS):
        raise OptionError(f"{option('kind')} is {kind!r}; an index is for {' or '.join(KINDS)}")
    if path.is_dir():
        raise IndexFileError(f"{path}: is a folder; name a file, such as {path / 'photos.index'}")
    found = Collection(places, recursive=recursive, exclude=exclude, rows=rows)
    for problem in found.problems:
        on_problem(problem)
    if passed_over := found.found.passed_over():
        (on_problem if found.found.missing else on_note)(passed_over)
    with held(path) as unfinished:
        old = read(path) if path.exists() else None
        kind = kind or (old.origin.kind if old else "search")
        check_kind(old, kind)
        return _Update(unfinished, old, found, kind, batch_size, reading, on_progress, on_problem).run(load, model)


def check_kind(stored: Stored | None, kind: str) -> None:
    """Raises IndexFileError if the index is for something else."""
    if stored is not None and stored.origin.kind != kind:
        other = stored.origin.kind
        raise IndexFileError(
            f"{stored.path}: is an index to {other}, not to {kind}; make another file with blip2 index --for {kind}"
        )


def check_model(stored: Stored, model: Model) -> None:
    """Raises IndexFileError if the vectors are another model's."""
    if stored.origin.identity != identity_of(model):
        raise IndexFileError(
            f"{stored.path}: was made by {stored.origin.model} (identity {stored.origin.identity}), and the model here "
            f"is {model.name} (identity {identity_of(model)}), which cannot read its vectors; use that model, or make "
            "a new index with this one"
        )


def identity_of(model: Model) -> str:
    """The model's own (`model.identity`); more than that where images do not become pixels as they usually do."""
    identity = model.identity if isinstance(model, Matcher) else model.speaker.identity
    settings: list[object] = [[round(value, 6) for value in values] for values in model.eye.normalization]
    if resizing := {name: value for name, value in model.eye.look.items() if name in ("resample", "shortest_edge")}:
        settings.append(resizing)
    if PIXELS_VERSION > 1:  # the first is that of files which do not say it
        settings.append(PIXELS_VERSION)
    is_usual = settings == [[round(value, 6) for value in values] for values in (CLIP_MEAN, CLIP_STD)]
    return identity if is_usual else f"{identity}-{crc32(json.dumps(settings).encode()):08x}"


def kind_of(model: Model) -> str:
    """What an index by this model is for."""
    return "search" if isinstance(model, Matcher) else "ask"


def current(picture: Picture, now: Stamp | None) -> Picture | None:
    """The row of an image if the file is still what was seen; where its stamp does not tell, its content does."""
    if now is None or picture.stamp.is_still(now):
        return picture if now is not None else None
    is_same = picture.digest and picture.stamp.size == now.size and digest_since(picture.path, now) == picture.digest
    return picture._replace(stamp=now) if is_same else None


@dataclass
class _Update:
    """One run."""

    unfinished: Unfinished
    old: Stored | None
    found: Collection
    kind: str
    batch_size: int
    reading: Reading
    on_progress: Callable[[int, int], None]
    on_problem: Callable[[str], None]

    def run(self, load: Load, name: str | None) -> Changes:
        before: dict[str, Stamp] = {}
        rows: dict[str, Row] = {}
        if self.old is not None:
            for number, picture in enumerate(self.old.pictures()):
                before[picture.path] = picture.stamp
                now = self.found.stamps.get(picture.path)
                is_elsewhere = now is None and not self.found.covers(picture.path)
                if (known := picture if is_elsewhere else current(picture, now)) is not None:
                    rows[picture.path] = Row(self.old, number, known)
        origin = self.old.origin if self.old is not None else None
        shards = self.unfinished.shards()
        name = _lasting(name or (origin or (shards[-1].origin if shards else None) or _unnamed(self.kind)).model)
        # No model is loaded for nothing, not even for images that are broken and were yesterday.
        if shards or (origin is not None and origin.model != name) or any(map(self._is_readable, self._missing(rows))):
            model = load(name, self.kind)
            if kind_of(model) != self.kind:
                raise OptionError(f"{name} is no model to make an index for {self.kind} with; name another")
            if self.old is not None:
                check_model(self.old, model)
            origin = Origin(self.kind, name, identity_of(model))
            self._take_over(shards, origin, rows)
            unreadable = self._encode(self._missing(rows), model, origin)
            self._take_over(self.unfinished.shards(), origin, rows)
        else:
            unreadable = self._report(self._missing(rows))
        if not rows or origin is None:
            raise IndexFileError(f"{self.unfinished.index}: none of the images can be read; it is left as it was")
        has_other = any(row.stored is not self.old or row.picture.stamp != before[path] for path, row in rows.items())
        if self.old is None or origin != self.old.origin or rows.keys() != before.keys() or has_other:
            self._merge(origin, rows)
        return Changes(
            new=len(rows.keys() - before.keys()),
            changed=sum(path in before and row.stored is not self.old for path, row in rows.items()),
            gone=len(before.keys() - rows.keys() - set(unreadable)),
            unreadable=len(unreadable),
            total=len(rows),
        )

    def _is_readable(self, path: str) -> bool:
        try:
            self.reading.load(path)
        except ImageError:
            return False
        return True

    def _missing(self, rows: dict[str, Row]) -> list[str]:
        return sorted(self.found.stamps.keys() - rows.keys())

    def _take_over(self, shards: list[Stored], origin: Origin, rows: dict[str, Row]) -> None:
        """What a run of the same model left, or this one did, of images that are still as they were then."""
        for shard in shards:
            if (shard.origin.kind, shard.origin.identity) != (origin.kind, origin.identity):
                continue
            for number, picture in enumerate(shard.pictures()):
                now = self.found.stamps.get(picture.path)
                if now is None and not self.found.covers(picture.path):
                    now = stamp_of(picture.path)
                if (known := current(picture, now)) is not None:
                    rows[picture.path] = Row(shard, number, known)

    def _encode(self, paths: list[str], model: Model, origin: Origin) -> list[str]:
        """Into the unfinished folder; the paths of what cannot be read come back."""
        unreadable: list[str] = []
        done: list[tuple[Future[Picture], Tensor]] = []
        kept_at = time.monotonic()

        def keep() -> None:
            if done:
                self.unfinished.add(origin, [(picture.result(), vectors_QD) for picture, vectors_QD in done])
                done.clear()

        with ThreadPoolExecutor(2, thread_name_prefix="blip2 digests") as pool:
            try:
                seen = model.each_encoded(paths, on_error="return", batch_size=self.batch_size)
                for number, (path, image) in enumerate(zip(paths, seen, strict=True), start=1):
                    try:
                        vectors_QD = _vectors(path, image)
                    except ImageError as error:
                        self.on_problem(str(error))
                        unreadable.append(path)
                    else:
                        done.append((pool.submit(self._picture, path, crc32_of(vectors_QD)), vectors_QD))
                    if len(done) >= SHARD_PICTURES or (done and time.monotonic() - kept_at > SHARD_SECONDS):
                        keep()
                        kept_at = time.monotonic()
                    self.on_progress(number, len(paths))
            except BaseException:
                with suppress(IndexFileError):  # what went wrong first is what is told
                    keep()
                raise
            keep()
        return unreadable

    def _picture(self, path: str, crc32: int) -> Picture:
        """The row of an image that was seen; without a digest if its file was changed meanwhile."""
        stamp = self.found.stamps[path]
        return Picture(path, stamp, crc32, digest_since(path, stamp))

    def _report(self, paths: list[str]) -> list[str]:
        for path in paths:
            try:
                self.reading.load(path)
            except ImageError as error:
                self.on_problem(str(error))
        return paths

    def _merge(self, origin: Origin, rows: dict[str, Row]) -> None:
        ordered = [rows[path] for path in sorted(rows)]

        def vectors() -> Iterator[Tensor]:
            for row in ordered:
                yield row.stored.vectors(row.number)

        shape = ordered[0].stored.rows.shape[1:]
        self.unfinished.replace(origin, [row.picture for row in ordered], shape, vectors())


def _vectors(path: str, image: ImageFeatures | EncodedImage | ImageError) -> Tensor:
    """What is kept of an image, ``float16[Q, D]``. Raises the ImageError that it is, or one if it overflows."""
    if isinstance(image, ImageError):
        raise image
    if isinstance(image, EncodedImage):
        vectors_QD = image.queries_QD.float().cpu()
    else:  # of length 1 also where the model computed them in half precision: the search counts on it
        vectors_QD = F.normalize(image.vectors_QE.float().cpu(), dim=-1)
    half_QD = vectors_QD.to(torch.float16).contiguous()
    if not half_QD.isfinite().all():
        raise ImageError(f"{path}: what the model sees of it is not finite; load the model in another precision")
    return half_QD


def _unnamed(kind: str) -> Origin:
    return Origin(kind, DEFAULT_MODELS[kind], "")


def _lasting(name: str) -> str:
    """A folder's name as it is understood from anywhere."""
    return os.path.abspath(name) if name not in BUNDLED and os.path.isdir(name) else name
