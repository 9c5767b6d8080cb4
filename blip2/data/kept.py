"""The files of a set of features, which several processes fill together: each picture has its place in them.

In one folder, for each set of pictures:

    <name>.bin    the features of picture n at n, each as `Coding` has it
    <name>.seen   a `RECORD` of each picture: how its file was when it was seen, and the checksum of its features
    <name>.json   the shape, how pictures become pixels, and fingerprints of the image encoder and the pictures' names

While they are made the first ends in ``.partial``. A picture's record is written once its features are on the disk, so
that what was interrupted goes on where it stopped; of a record that is half written the checksum is wrong.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2 import disk
from blip2.data.coding import Coding
from blip2.data.loader import Pictures, Sight
from blip2.disk import Stamp, stamp_of
from blip2.errors import RecipeError
from blip2.image import PIXELS_VERSION

RECORD = np.dtype([
    ("stamp", "<i8", 3), ("digest", "u1", 16), ("features_crc32", "<u4"), ("crc32", "<u4"),
])  # fmt: skip
"""``stamp`` of the file in which the picture lies, ``digest`` of the picture's own bytes (see `disk`), ``crc32`` of its
number and of all before. All zero: there are no features of it."""
UNKNOWN = Stamp(-1, -1, -1)


class FeatureFile:
    """Features on the disk; rows are read, and compared with their checksums, when they are asked for."""

    def __init__(self, path: Path, coding: Coding, crc32_N: np.ndarray) -> None:
        self._file, self._coding, self._crc32_N = disk.OpenFile(path), coding, crc32_N

    def __len__(self) -> int:
        return len(self._crc32_N)

    def read(self, numbers: np.ndarray) -> Tensor:
        """``float16[B, 1 + P, D]`` of the pictures with these numbers, NaN for one that could not be read.

        Raises RecipeError for what is damaged.
        """
        rows_BR = torch.empty(len(numbers), self._coding.row_bytes, dtype=torch.uint8)
        for row_R, number in zip(rows_BR, numbers.tolist(), strict=True):
            content = memoryview(row_R.numpy())
            try:
                self._file.read(number * len(content), content)
                if zlib.crc32(content) != self._crc32_N[number]:
                    raise OSError(f"what it holds of picture {number} is not what was written")
            except OSError as error:
                raise RecipeError(
                    f"{self._file.path}: is damaged ({error.strerror or error}); delete it, and start again: it is "
                    "made anew"
                ) from None
        return self._coding.decode(rows_BR)


class Kept:
    """The three files. One process begins and finishes, any number of them write, each picture by one of them."""

    def __init__(self, folder: Path, name: str, header: dict[str, Any], coding: Coding) -> None:
        self._whole, self._partial = folder / f"{name}.bin", folder / f"{name}.bin.partial"
        self._seen, self._description = folder / f"{name}.seen", folder / f"{name}.json"
        self._header, self._coding = header, coding
        self._count: int = header["shape"][0]

    @property
    def _path(self) -> Path:
        return self._whole if self._whole.exists() else self._partial

    def begin(self, pictures: Pictures) -> None:
        """Find out what is there, and make room for the rest: by the one process that has the lock.

        Raises RecipeError if what is there belongs to another header, OSError if nothing can be written.
        """
        self._description.parent.mkdir(parents=True, exist_ok=True)
        if not self._description.exists() or _check(self._description, self._header) != PIXELS_VERSION:
            # Nobody knows whose they are; or they are of other pixels than these files give now.
            for path in (self._whole, self._partial, self._seen):
                path.unlink(missing_ok=True)
        if not self._is_described():  # or less was told of these features once
            disk.write_text(self._description, json.dumps(self._header, indent=1))
        size = self._count * self._coding.row_bytes
        if self._path == self._whole and self._whole.stat().st_size != size:
            raise RecipeError(
                f"{self._whole}: not of the size that {self._description.name} promises; delete both, and start again"
            )
        records = self._records()
        self._forget_changed(records, pictures)
        if self._path == self._partial:
            self._partial.touch()
            with self._partial.open("r+b") as file:
                file.truncate(size)
        content = records.tobytes()
        if not self._seen.exists() or self._seen.read_bytes() != content:
            disk.write_bytes(self._seen, content)

    def missing(self) -> list[int]:
        """The pictures of which there are no features. Raises RecipeError where another process has begun, and nothing
        of it is to be seen here."""
        if not self._is_described():
            raise RecipeError(
                f"{self._description}: what the first process writes there is not to be seen by this one; name a "
                "folder as data.features that all processes share"
            )
        return np.flatnonzero(self._records()["crc32"] == 0).tolist()

    def _is_described(self) -> bool:
        try:
            return bool(json.loads(self._description.read_text("utf-8")) == self._header)
        except (OSError, ValueError):
            return False

    def write(self, numbers: Sequence[int], rows: Sequence[bytes], sights: Sequence[Sight]) -> None:
        """Features as `Coding` has them, on the disk when this returns. Raises OSError."""
        with self._path.open("r+b") as file:
            for number, row in zip(numbers, rows, strict=True):
                file.seek(number * len(row))
                file.write(row)
        disk.sync(self._path)  # before there are records of it
        with self._seen.open("r+b") as file:
            for number, row, sight in zip(numbers, rows, sights, strict=True):
                file.seek(number * RECORD.itemsize)
                file.write(_record(number, sight, row))

    def finish(self) -> None:
        """All are there: give them their name. By one process. Raises OSError."""
        disk.sync(self._seen)
        if self._path == self._partial:
            disk.replace([(self._partial, self._whole)])

    def opened(self) -> FeatureFile:
        return FeatureFile(self._whole, self._coding, self._records()["features_crc32"].copy())

    def _records(self) -> np.ndarray:
        """`RECORD` of each picture; all zero where there is no whole one, or no features."""
        num_rows = self._path.stat().st_size // self._coding.row_bytes if self._path.exists() else 0
        records = read_records(self._seen, self._count)
        records[num_rows:] = 0
        return records

    def _forget_changed(self, records: np.ndarray, pictures: Pictures) -> None:
        """Leave the records of what is as it was; of a file that is gone, it is what was in it."""
        now_of = cache(stamp_of)  # many pictures may lie in one file
        doubtful = []
        for number in np.flatnonzero(records["crc32"]).tolist():
            seen, now = Stamp(*records[number]["stamp"].tolist()), now_of(pictures.paths[number])
            if seen == UNKNOWN:
                records[number] = 0
            elif now is not None and not seen.is_still(now):
                doubtful.append(number)
        with ThreadPoolExecutor(4) as pool:
            for number, (stamp, digest) in zip(doubtful, pool.map(pictures.digest, doubtful), strict=True):
                if stamp is None or records[number]["digest"].tobytes().hex() != digest:
                    records[number] = 0
                else:  # copied, or only touched, or another picture of the same file has changed
                    records[number]["stamp"] = stamp
                    records[number]["crc32"] = _crc32(number, records[number].tobytes())


def read_records(path: Path, count: int) -> np.ndarray:
    """`RECORD` of so many pictures; all zero where there is no whole one. Raises OSError."""
    records = np.zeros(count, RECORD)
    content = path.read_bytes() if path.exists() else b""
    size = RECORD.itemsize
    for number in range(min(count, len(content) // size)):
        record = content[number * size : (number + 1) * size]
        if _crc32(number, record) == int.from_bytes(record[-4:], "little"):
            records[number] = np.frombuffer(record, RECORD)[0]
    return records


def _record(number: int, sight: Sight, features: bytes) -> bytes:
    """Of a picture that was stamped before it was seen. Where it changed meanwhile, it will be seen again."""
    record = np.zeros((), RECORD)
    record["stamp"] = sight.stamp if sight.stamp is not None and sight.digest else UNKNOWN
    record["digest"] = np.frombuffer(bytes.fromhex(sight.digest or "00" * 16), np.uint8)
    record["features_crc32"] = zlib.crc32(features)
    record["crc32"] = _crc32(number, record.tobytes())
    return record.tobytes()


def _crc32(number: int, record: bytes) -> int:
    """Of all but itself, which comes last. Never 0, which is where there is no record."""
    return zlib.crc32(record[:-4], number) or 1


def _check(description: Path, header: dict[str, Any]) -> object:
    """Raises RecipeError for what belongs to another header; returns by which `PIXELS_VERSION` it was made."""
    try:
        found = json.loads(description.read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RecipeError(f"{description}: is damaged; delete it, and start again: the features are made anew")
    for key, meaning in (
        ("vision", "another image encoder"), ("pictures", "other pictures"), ("dtype", "another data.features_dtype"),
    ):  # fmt: skip
        if found.get(key) != header[key]:
            raise RecipeError(
                f"{description}: these features were made by or for {meaning}; delete them or name another "
                "folder as data.features"
            )
    return found.get("pixels")
