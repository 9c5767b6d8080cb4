"""The index file: plain safetensors that any program can open, written row by row, read on demand.

    vectors    float16[N, Q, D]   one vector per image and query token
    pictures   uint8[bytes]       N lines of JSON: path, size, mtime_ns, ctime_ns and digest (of the image's content,
                                  both left out if unknown), crc32 (of its vectors, always last)
    metadata   format, version, kind, model, identity, checksum (of everything except the vectors)

Rows are sorted by path, so that the same images make the same file, whatever their order.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from blip2.disk import OpenFile, Stamp
from blip2.errors import IndexFileError
from blip2.index.rows import Rows
from blip2.tensorfile import read_header

FORMAT = "blip2 index"
VERSION = "1"
KINDS = ("search", "ask")
ALIGNMENT = 64
"""Alignment of the vectors in bytes, for fast vector instructions."""


@dataclass(frozen=True)
class Origin:
    """What the vectors are: ``identity`` is the `model.identity` of the model that made them, ``model`` its name for
    `load`.

    ``kind``: "search", unit vectors of a matching model; "ask", input of a language model.
    """

    kind: str
    model: str
    identity: str

    def about(self) -> dict[str, str]:
        return {
            "format": FORMAT, "version": VERSION, "kind": self.kind, "model": self.model, "identity": self.identity,
        }  # fmt: skip


class IndexedImage(NamedTuple):
    """A row: the image's absolute path, the file's stamp when it was encoded, the checksum of its vectors, and the
    digest of its content, or "" if unknown."""

    path: str
    stamp: Stamp
    crc32: int
    digest: str = ""

    def line(self) -> bytes:
        row = {"path": self.path} | self.stamp._asdict() | {"digest": self.digest, "crc32": self.crc32}
        row = {name: value for name, value in row.items() if value or name not in ("ctime_ns", "digest")}
        # ASCII escapes preserve even names that are not UTF-8.
        return json.dumps(row).encode("ascii") + b"\n"


class Stored:
    """An open index file. ``rows``: its vectors, read on demand and checked."""

    def __init__(self, file: OpenFile, origin: Origin, shape: tuple[int, ...], start: int, lines: bytes) -> None:
        self.path = file.path
        self.origin = origin
        self._lines = lines
        self._ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))
        crc32_N = np.array(re.findall(rb'"crc32": (\d+)}\n', lines), np.uint32)
        self.rows = Rows(file, start, shape, crc32_N, lambda row: self.image(row).path)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return read, (self.path,)

    @property
    def vectors_NQD(self) -> Tensor:
        """Memory-mapped, so only accessed parts are read. Not checked. Raises IndexFileError if the file is
        truncated."""
        return self.rows.mapped()

    def image(self, row: int) -> IndexedImage:
        start = int(self._ends[row - 1]) + 1 if row else 0
        found = json.loads(self._lines[start : int(self._ends[row])])
        stamp = Stamp(found["size"], found["mtime_ns"], found.get("ctime_ns", 0))
        return IndexedImage(found["path"], stamp, found["crc32"], found.get("digest", ""))

    def images(self) -> list[IndexedImage]:
        return [self.image(row) for row in range(len(self))]

    def vectors(self, row: int) -> Tensor:
        """An image's vectors ``float16[Q, D]``. Raises IndexFileError if they do not match their checksum."""
        return self.rows[np.array([row])][0]


def crc32_of(vectors_QD: Tensor) -> int:
    """The checksum of an image's vectors."""
    return zlib.crc32(vectors_QD.numpy().data)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the header of an index, or its suffix."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return path.suffix == ".index" or FORMAT.encode() in file.read(100)
    except OSError:
        return False


def read(path: str | os.PathLike[str], held: bool = True) -> Stored:
    """Open an index. Raises IndexFileError if it is not a complete index. ``held``: see `OpenFile`."""
    path = Path(path)
    if not path.exists():
        raise IndexFileError(f"{path}: no such index; make one with blip2 index PHOTOS -o {path}")
    if path.is_dir():
        raise IndexFileError(f"{path}: is a folder; name the file of an index, such as {path / 'photos.index'}")
    try:
        header = read_header(path)
        file = OpenFile(path, held)
        vectors, images = (header.tensors.get(name) for name in ("vectors", "pictures"))
        lines = bytearray(0 if images is None else images.num_bytes)
        if images is not None:
            file.read(images.start, memoryview(lines))
    except OSError as error:
        raise IndexFileError(
            f"{path}: is not an index of images, or is truncated ({error}); make it again with blip2 index"
        ) from None
    about = header.about
    if about.get("format") != FORMAT:
        raise IndexFileError(f"{path}: is a safetensors file, but not an index of images")
    if about.get("version") != VERSION:
        raise IndexFileError(
            f"{path}: was written by another version of blip2 (format {about.get('version')}, here "
            f"{VERSION}); make it again with blip2 index"
        )
    origin = Origin(*(about.get(name, "") for name in ("kind", "model", "identity")))
    is_sound = (
        vectors is not None
        and (vectors.dtype, len(vectors.shape)) == ("F16", 3)
        and about.get("checksum") == _checksum(origin, vectors.shape, bytes(lines))
    )
    if not is_sound or origin.kind not in KINDS:
        raise IndexFileError(
            f"{path}: is damaged (its list of images does not match its checksum); delete it, and make it again with "
            "blip2 index"
        )
    assert vectors is not None
    return Stored(file, origin, vectors.shape, vectors.start, bytes(lines))


def write(
    path: Path, origin: Origin, images: Sequence[IndexedImage], shape: tuple[int, int], vectors: Iterable[Tensor]
) -> None:
    """Write an index whose images have vectors ``float16[shape]``, taken one by one.

    Leaves a partial file if it fails; use it within `disk.written`. Raises OSError.
    """
    lines = b"".join(image.line() for image in images)
    full_shape = (len(images), *shape)
    num_bytes = 2 * len(images) * shape[0] * shape[1]
    # Not written by the library, which needs all vectors in memory.
    header = json.dumps(
        {
            "__metadata__": {**origin.about(), "checksum": _checksum(origin, full_shape, lines)},
            "vectors": {"dtype": "F16", "shape": full_shape, "data_offsets": [0, num_bytes]},
            "pictures": {"dtype": "U8", "shape": [len(lines)], "data_offsets": [num_bytes, num_bytes + len(lines)]},
        }
    ).encode("ascii")
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for vectors_QD in vectors:
            file.write(vectors_QD.numpy().data)
        file.write(lines)


def _checksum(origin: Origin, shape: Sequence[int], lines: bytes) -> str:
    """The checksum of everything in the file except the vectors."""
    origin_json = json.dumps([origin.about(), list(shape)]).encode("ascii")
    return f"{zlib.crc32(lines, zlib.crc32(origin_json)):08x}"
