"""The file of an index: plain safetensors that anyone can open, mapped when read, written row after row.

    vectors    float16[N, Q, D]   of each picture one vector a query
    pictures   uint8[bytes]       N lines of JSON: path, size, mtime_ns, crc32 (of the picture's vectors)
    metadata   format, version, kind, model, identity, checksum (of all that is not vectors)

Rows are sorted by path, so that the same pictures make the same file, whatever the order in which they came.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2.errors import IndexFileError
from blip2.index.folders import Stamp

FORMAT = "blip2 index"
VERSION = "1"
KINDS = ("search", "ask")
ALIGNMENT = 64
"""The vectors begin at a multiple of so many bytes, as the fastest instructions like them."""


@dataclass(frozen=True)
class Origin:
    """What the vectors are, and of which model: ``identity`` is `model.identity`, ``model`` the name it loads by.

    ``kind``: "search", unit vectors of a matching model; "ask", what a language model reads.
    """

    kind: str
    model: str
    identity: str

    def about(self) -> dict[str, str]:
        return {
            "format": FORMAT, "version": VERSION, "kind": self.kind, "model": self.model, "identity": self.identity,
        }  # fmt: skip


class Picture(NamedTuple):
    """A row: the picture's absolute path, the file's stamp when it was seen, the checksum of its vectors."""

    path: str
    stamp: Stamp
    crc32: int

    def line(self) -> bytes:
        size, mtime_ns = self.stamp
        row = {"path": self.path, "size": size, "mtime_ns": mtime_ns, "crc32": self.crc32}
        # In ASCII even a name that is no UTF-8 comes back as it was: its odd bytes are escaped.
        return json.dumps(row).encode("ascii") + b"\n"


class Stored:
    """An index file that is open. ``vectors_NQD`` is mapped: what is not looked at is not read."""

    def __init__(self, path: Path, origin: Origin, vectors_NQD: Tensor, lines: Tensor) -> None:
        self.path = path
        self.origin = origin
        self.vectors_NQD = vectors_NQD
        self._lines = lines.numpy().tobytes()
        self._ends = np.flatnonzero(np.frombuffer(self._lines, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self.vectors_NQD)

    def picture(self, row: int) -> Picture:
        start = int(self._ends[row - 1]) + 1 if row else 0
        found = json.loads(self._lines[start : int(self._ends[row])])
        return Picture(found["path"], Stamp(found["size"], found["mtime_ns"]), found["crc32"])

    def pictures(self) -> list[Picture]:
        return [self.picture(row) for row in range(len(self))]

    def vectors(self, row: int) -> Tensor:
        """A picture's vectors ``float16[Q, D]``, as they were written. Raises IndexFileError if they are not."""
        vectors_QD = self.vectors_NQD[row]
        picture = self.picture(row)
        if crc32_of(vectors_QD) != picture.crc32:
            raise IndexFileError(
                f"{self.path}: is damaged (what it holds of {picture.path} is not what was written); delete it, and "
                "make it again with blip2 index"
            )
        return vectors_QD


def crc32_of(vectors_QD: Tensor) -> int:
    """The checksum of a picture's vectors."""
    return zlib.crc32(vectors_QD.numpy().data)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself that it is an index, or is called like one."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return path.suffix == ".index" or FORMAT.encode() in file.read(100)
    except OSError:
        return False


def read(path: str | os.PathLike[str]) -> Stored:
    """Open an index. Raises IndexFileError for anything that is not a whole one."""
    path = Path(path)
    if not path.exists():
        raise IndexFileError(f"{path}: there is no such index; make one with blip2 index PHOTOS -o {path}")
    if path.is_dir():
        raise IndexFileError(f"{path}: is a folder; name the file of an index, such as {path / 'photos.index'}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise IndexFileError(f"{path}: is another safetensors file, no index of pictures")
            if about.get("version") != VERSION:
                raise IndexFileError(
                    f"{path}: was written by another version of this program (format {about.get('version')}, here "
                    f"{VERSION}); make it again with blip2 index"
                )
            vectors_NQD, lines = file.get_tensor("vectors"), file.get_tensor("pictures")
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, IndexFileError):
            raise
        reason = " ".join(str(error).split())
        raise IndexFileError(
            f"{path}: is no index of pictures, or cut short ({reason}); make it again with blip2 index"
        ) from None
    origin = Origin(*(about.get(name, "") for name in ("kind", "model", "identity")))
    is_sound = (
        vectors_NQD.dtype == torch.float16
        and vectors_NQD.dim() == 3
        and lines.dtype == torch.uint8
        and lines.dim() == 1
        and about.get("checksum") == _checksum(origin, vectors_NQD.shape, lines.numpy().tobytes())
    )
    if not is_sound or origin.kind not in KINDS:
        raise IndexFileError(
            f"{path}: is damaged (its list of pictures is not what was written); delete it, and make it again with "
            "blip2 index"
        )
    return Stored(path, origin, vectors_NQD, lines)


def write(
    path: Path, origin: Origin, pictures: Sequence[Picture], shape: tuple[int, int], vectors: Iterable[Tensor]
) -> None:
    """Write an index whose pictures have vectors ``float16[shape]``, taken one after the other; safe on the disk.

    Raises OSError.
    """
    lines = b"".join(picture.line() for picture in pictures)
    full_shape = (len(pictures), *shape)
    num_bytes = 2 * len(pictures) * shape[0] * shape[1]
    # Written here and not by the library, which wants all vectors in memory.
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
        file.flush()
        os.fsync(file.fileno())


def _checksum(origin: Origin, shape: Sequence[int], lines: bytes) -> str:
    """Of all that is in the file besides the vectors."""
    told = json.dumps([origin.about(), list(shape)]).encode("ascii")
    return f"{zlib.crc32(lines, zlib.crc32(told)):08x}"
