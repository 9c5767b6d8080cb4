"""Updating an index from folders: encode new and changed images, remove deleted ones, lose no work."""

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
from blip2.index.file import KINDS, IndexedImage, Origin, Stored, crc32_of, read
from blip2.index.folders import Collection
from blip2.index.unfinished import Unfinished, held
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.match import ImageFeatures
from blip2.tasks.speaker import check_batch_size

SHARD_IMAGES = 256
SHARD_SECONDS = 30.0
"""Number of images and seconds after which results are stored; a killed run loses at most that."""
DEFAULT_MODELS = {"search": "miniature-itm", "ask": "miniature"}

Model = Matcher | Pipeline
Load = Callable[[str, str], Model]
"""Loads a model by name, for a kind of index."""


@dataclass(frozen=True)
class Changes:
    """What an update did, as numbers of images; ``total``: images in the index now."""

    new: int
    changed: int
    gone: int
    unreadable: int
    total: int

    def __str__(self) -> str:
        text = f"{self.new:,} new, {self.changed:,} changed, {self.gone:,} gone"
        return f"{text}, {self.unreadable:,} could not be read" if self.unreadable else text


class Row(NamedTuple):
    """Where an image's vectors are: an open file, the row in it, and the row's record of the image."""

    stored: Stored
    number: int
    image: IndexedImage


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
    """Make the index of the images in folders (and single files), or update it.

    An image with unchanged size and times is not read again; if these differ, but the content does not, it is not
    encoded again. Images of folders that are not named are kept. ``kind``: "search" or "ask", by default the index's
    own, or "search". ``load`` returns the model of a name for that kind, and is only called if it is needed; ``model``
    is the name, by default the index's own. ``recursive`` and ``exclude``: see `data.folders.find_in`; images that they
    leave out are removed from the index. ``rows``: places may be files of rows that name images (JSON lines, CSV,
    parquet, COCO); these options say how they are read: ``image_column``, ``images`` and ``split`` as in
    `collection.sources.open_source`. ``reading``: limits for reading images, as for the model. ``on_progress``: images
    done and total. ``on_problem``: a line for each image or folder that cannot be read and is skipped; images of such a
    folder stay in the index. ``on_note``: a line that counts files that are not images. Raises IndexFileError (the
    index is then unchanged, and finished work is kept for the next run) and OptionError.
    """
    path = Path(os.path.realpath(path))
    check_batch_size(batch_size)
    if kind not in (None, *KINDS):
        raise OptionError(f"{option('kind')} is {kind!r}; use {' or '.join(KINDS)}")
    if path.is_dir():
        raise IndexFileError(f"{path}: is a folder; name a file, such as {path / 'photos.index'}")
    found = Collection(places, recursive=recursive, exclude=exclude, rows=rows)
    for problem in found.problems:
        on_problem(problem)
    if skipped_files := found.found.skipped_files():
        (on_problem if found.found.missing else on_note)(skipped_files)
    with held(path) as unfinished:
        old = read(path) if path.exists() else None
        kind = kind or (old.origin.kind if old else "search")
        check_kind(old, kind)
        return _Update(unfinished, old, found, kind, batch_size, reading, on_progress, on_problem).run(load, model)


def check_kind(stored: Stored | None, kind: str) -> None:
    """Raises IndexFileError if the index is of another kind."""
    if stored is not None and stored.origin.kind != kind:
        other = stored.origin.kind
        raise IndexFileError(
            f"{stored.path}: is an index to {other}, not to {kind}; make another one with blip2 index --for {kind}"
        )


def check_model(stored: Stored, model: Model) -> None:
    """Raises IndexFileError if the vectors are of another model."""
    if stored.origin.identity != identity_of(model):
        raise IndexFileError(
            f"{stored.path}: was made by {stored.origin.model} (identity {stored.origin.identity}), but the model here "
            f"is {model.name} (identity {identity_of(model)}), which cannot read its vectors; use that model, or make "
            "a new index with this one"
        )


def identity_of(model: Model) -> str:
    """The `model.identity`, with a suffix if images are preprocessed in another than the usual way."""
    identity = model.identity if isinstance(model, Matcher) else model.speaker.identity
    settings: list[object] = [[round(value, 6) for value in values] for values in model.frontend.normalization]
    options = model.frontend.look
    if resizing := {name: value for name, value in options.items() if name in ("resample", "shortest_edge")}:
        settings.append(resizing)
    if PIXELS_VERSION > 1:  # 1 is the version of files without one
        settings.append(PIXELS_VERSION)
    is_usual = settings == [[round(value, 6) for value in values] for values in (CLIP_MEAN, CLIP_STD)]
    return identity if is_usual else f"{identity}-{crc32(json.dumps(settings).encode()):08x}"


def kind_of(model: Model) -> str:
    """The kind of index that this model makes."""
    return "search" if isinstance(model, Matcher) else "ask"


def current(image: IndexedImage, now: Stamp | None) -> IndexedImage | None:
    """The row of an image if its file is unchanged; if its stamp has changed, the content decides."""
    if now is None or image.stamp.is_still(now):
        return image if now is not None else None
    is_same = image.digest and image.stamp.size == now.size and digest_since(image.path, now) == image.digest
    return image._replace(stamp=now) if is_same else None


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
            for number, image in enumerate(self.old.images()):
                before[image.path] = image.stamp
                now = self.found.stamps.get(image.path)
                is_elsewhere = now is None and not self.found.covers(image.path)
                if (known := image if is_elsewhere else current(image, now)) is not None:
                    rows[image.path] = Row(self.old, number, known)
        origin = self.old.origin if self.old is not None else None
        shards = self.unfinished.shards()
        name = _lasting(name or (origin or (shards[-1].origin if shards else None) or _unnamed(self.kind)).model)
        # Do not load a model for nothing, not even for images that were unreadable before and still are.
        if shards or (origin is not None and origin.model != name) or any(map(self._is_readable, self._missing(rows))):
            model = load(name, self.kind)
            if kind_of(model) != self.kind:
                raise OptionError(f"{name} cannot make an index for {self.kind}; name another model")
            if self.old is not None:
                check_model(self.old, model)
            origin = Origin(self.kind, name, identity_of(model))
            self._take_over(shards, origin, rows)
            unreadable = self._encode(self._missing(rows), model, origin)
            self._take_over(self.unfinished.shards(), origin, rows)
        else:
            unreadable = self._report(self._missing(rows))
        if not rows or origin is None:
            raise IndexFileError(f"{self.unfinished.index}: none of the images can be read; the index is unchanged")
        has_other = any(row.stored is not self.old or row.image.stamp != before[path] for path, row in rows.items())
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
        """Take over results of the same model, by an earlier run or this one, for images that are unchanged."""
        for shard in shards:
            if (shard.origin.kind, shard.origin.identity) != (origin.kind, origin.identity):
                continue
            for number, image in enumerate(shard.images()):
                now = self.found.stamps.get(image.path)
                if now is None and not self.found.covers(image.path):
                    now = stamp_of(image.path)
                if (known := current(image, now)) is not None:
                    rows[image.path] = Row(shard, number, known)

    def _encode(self, paths: list[str], model: Model, origin: Origin) -> list[str]:
        """Encode into the unfinished folder; returns the paths of unreadable images."""
        unreadable: list[str] = []
        done: list[tuple[Future[IndexedImage], Tensor]] = []
        kept_at = time.monotonic()

        def keep() -> None:
            if done:
                self.unfinished.add(origin, [(original.result(), vectors_QD) for original, vectors_QD in done])
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
                        done.append((pool.submit(self._image, path, crc32_of(vectors_QD)), vectors_QD))
                    if len(done) >= SHARD_IMAGES or (done and time.monotonic() - kept_at > SHARD_SECONDS):
                        keep()
                        kept_at = time.monotonic()
                    self.on_progress(number, len(paths))
            except BaseException:
                with suppress(IndexFileError):  # report the first error
                    keep()
                raise
            keep()
        return unreadable

    def _image(self, path: str, crc32: int) -> IndexedImage:
        """The row of an encoded image; without a digest if its file has changed meanwhile."""
        stamp = self.found.stamps[path]
        return IndexedImage(path, stamp, crc32, digest_since(path, stamp))

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
        self.unfinished.replace(origin, [row.image for row in ordered], shape, vectors())


def _vectors(path: str, image: ImageFeatures | EncodedImage | ImageError) -> Tensor:
    """The vectors to store, ``float16[Q, D]``. Raises the image's ImageError, or one if the values overflow."""
    if isinstance(image, ImageError):
        raise image
    if isinstance(image, EncodedImage):
        vectors_QD = image.queries_QD.float().cpu()
    else:  # normalise also after half precision, since the search relies on length 1
        vectors_QD = F.normalize(image.vectors_QE.float().cpu(), dim=-1)
    half_QD = vectors_QD.to(torch.float16).contiguous()
    if not half_QD.isfinite().all():
        raise ImageError(f"{path}: its features are not finite; load the model in another precision")
    return half_QD


def _unnamed(kind: str) -> Origin:
    return Origin(kind, DEFAULT_MODELS[kind], "")


def _lasting(name: str) -> str:
    """A folder's name as an absolute path."""
    return os.path.abspath(name) if name not in BUNDLED and os.path.isdir(name) else name
