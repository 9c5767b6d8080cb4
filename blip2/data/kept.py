"""The files of a set of features, which several processes write together. Each image has a fixed place.

In one folder, for each set of images:

    <name>.bin    the features of image n at n, each as `Coding` has it
    <name>.seen   a `RECORD` of each image: its file's state when it was encoded, and the checksum of its features
    <name>.json   the shape, the preprocessing, and fingerprints of the image encoder and the images' names

While incomplete, the first has the suffix ``.partial``. A record is written after the features are on the disk, so
that an interrupted computation resumes where it stopped. An incomplete record has a wrong checksum.
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
from blip2.data.loader import LoadedImage, RowImages
from blip2.disk import Stamp, stamp_of
from blip2.errors import RecipeError
from blip2.image import PIXELS_VERSION

RECORD = np.dtype([
    ("stamp", "<i8", 3), ("digest", "u1", 16), ("features_crc32", "<u4"), ("crc32", "<u4"),
])  # fmt: skip
"""``stamp`` of the file that contains the image, ``digest`` of the image's own bytes (see `disk`), ``crc32`` of the
image number and all fields before. All zero: there are no features."""
UNKNOWN = Stamp(-1, -1, -1)


class FeatureFile:
    """Features on disk. Rows are read, and their checksums verified, on demand."""

    def __init__(self, path: Path, coding: Coding, crc32_N: np.ndarray) -> None:
        self._file, self._coding, self._crc32_N = disk.OpenFile(path), coding, crc32_N

    def __len__(self) -> int:
        return len(self._crc32_N)

    def read(self, numbers: np.ndarray) -> Tensor:
        """``float16[B, 1 + P, D]`` of the images with these numbers, NaN for an unreadable image.

        Raises RecipeError for damaged data.
        """
        rows_BR = torch.empty(len(numbers), self._coding.row_bytes, dtype=torch.uint8)
        for row_R, number in zip(rows_BR, numbers.tolist(), strict=True):
            content = memoryview(row_R.numpy())
            try:
                self._file.read(number * len(content), content)
                if zlib.crc32(content) != self._crc32_N[number]:
                    raise OSError(f"wrong checksum of image {number}")
            except OSError as error:
                raise RecipeError(
                    f"{self._file.path}: is damaged ({error.strerror or error}); delete it and start again to make it "
                    "anew"
                ) from None
        return self._coding.decode(rows_BR)


class Kept:
    """The three files. One process begins and finishes; all processes write, each for different images."""

    def __init__(self, folder: Path, name: str, header: dict[str, Any], coding: Coding) -> None:
        self._whole, self._partial = folder / f"{name}.bin", folder / f"{name}.bin.partial"
        self._seen, self._description = folder / f"{name}.seen", folder / f"{name}.json"
        self._header, self._coding = header, coding
        self._count: int = header["shape"][0]

    @property
    def _path(self) -> Path:
        return self._whole if self._whole.exists() else self._partial

    def begin(self, images: RowImages) -> None:
        """Read what exists and allocate the rest. Called by the process that holds the lock.

        Raises RecipeError if existing features belong to another header, OSError if nothing can be written.
        """
        self._description.parent.mkdir(parents=True, exist_ok=True)
        if not self._description.exists() or _check(self._description, self._header) != PIXELS_VERSION:
            # Of unknown origin, or from an older version of the preprocessing.
            for path in (self._whole, self._partial, self._seen):
                path.unlink(missing_ok=True)
        if not self._is_described():  # or an older version wrote fewer fields
            disk.write_text(self._description, json.dumps(self._header, indent=1))
        size = self._count * self._coding.row_bytes
        if self._path == self._whole and self._whole.stat().st_size != size:
            raise RecipeError(
                f"{self._whole}: does not have the size that {self._description.name} states; delete both and start "
                "again"
            )
        records = self._records()
        self._forget_changed(records, images)
        if self._path == self._partial:
            self._partial.touch()
            with self._partial.open("r+b") as file:
                file.truncate(size)
        content = records.tobytes()
        if not self._seen.exists() or self._seen.read_bytes() != content:
            disk.write_bytes(self._seen, content)

    def missing(self) -> list[int]:
        """The images without features. Raises RecipeError if another process has begun, but its files are not visible
        here."""
        if not self._is_described():
            raise RecipeError(
                f"{self._description}: this process cannot see what the first process wrote there; name a folder as "
                "data.features that all processes share"
            )
        return np.flatnonzero(self._records()["crc32"] == 0).tolist()

    def _is_described(self) -> bool:
        try:
            return bool(json.loads(self._description.read_text("utf-8")) == self._header)
        except (OSError, ValueError):
            return False

    def write(self, numbers: Sequence[int], rows: Sequence[bytes], images: Sequence[LoadedImage]) -> None:
        """Write features in the format of `Coding`; they are on the disk when this returns. Raises OSError."""
        with self._path.open("r+b") as file:
            for number, row in zip(numbers, rows, strict=True):
                file.seek(number * len(row))
                file.write(row)
        disk.sync(self._path)  # before their records are written
        with self._seen.open("r+b") as file:
            for number, row, image in zip(numbers, rows, images, strict=True):
                file.seek(number * RECORD.itemsize)
                file.write(_record(number, image, row))

    def finish(self) -> None:
        """Rename the complete file. Called by one process. Raises OSError."""
        disk.sync(self._seen)
        if self._path == self._partial:
            disk.replace([(self._partial, self._whole)])

    def opened(self) -> FeatureFile:
        return FeatureFile(self._whole, self._coding, self._records()["features_crc32"].copy())

    def _records(self) -> np.ndarray:
        """`RECORD` of each image; all zero if it is incomplete or there are no features."""
        num_rows = self._path.stat().st_size // self._coding.row_bytes if self._path.exists() else 0
        records = read_records(self._seen, self._count)
        records[num_rows:] = 0
        return records

    def _forget_changed(self, records: np.ndarray, images: RowImages) -> None:
        """Keep the records of unchanged images, and those of files that are gone."""
        now_of = cache(stamp_of)  # one file may contain many images
        doubtful = []
        for number in np.flatnonzero(records["crc32"]).tolist():
            seen, now = Stamp(*records[number]["stamp"].tolist()), now_of(images.paths[number])
            if seen == UNKNOWN:
                records[number] = 0
            elif now is not None and not seen.is_still(now):
                doubtful.append(number)
        with ThreadPoolExecutor(4) as pool:
            for number, (stamp, digest) in zip(doubtful, pool.map(images.digest, doubtful), strict=True):
                if stamp is None or records[number]["digest"].tobytes().hex() != digest:
                    records[number] = 0
                else:  # copied, or touched, or another image in the same file has changed
                    records[number]["stamp"] = stamp
                    records[number]["crc32"] = _crc32(number, records[number].tobytes())


def read_records(path: Path, count: int) -> np.ndarray:
    """`RECORD` of ``count`` images; all zero if incomplete. Raises OSError."""
    records = np.zeros(count, RECORD)
    content = path.read_bytes() if path.exists() else b""
    size = RECORD.itemsize
    for number in range(min(count, len(content) // size)):
        record = content[number * size : (number + 1) * size]
        if _crc32(number, record) == int.from_bytes(record[-4:], "little"):
            records[number] = np.frombuffer(record, RECORD)[0]
    return records


def _record(number: int, image: LoadedImage, features: bytes) -> bytes:
    """The record of an image whose file was stamped before it was read. If it changed meanwhile, it will be encoded
    again."""
    record = np.zeros((), RECORD)
    record["stamp"] = image.stamp if image.stamp is not None and image.digest else UNKNOWN
    record["digest"] = np.frombuffer(bytes.fromhex(image.digest or "00" * 16), np.uint8)
    record["features_crc32"] = zlib.crc32(features)
    record["crc32"] = _crc32(number, record.tobytes())
    return record.tobytes()


def _crc32(number: int, record: bytes) -> int:
    """Checksum of all fields but the last, which holds it. Never 0, which means that there is no record."""
    return zlib.crc32(record[:-4], number) or 1


def _check(description: Path, header: dict[str, Any]) -> object:
    """Raises RecipeError if the files belong to another header; returns the `PIXELS_VERSION` that made them."""
    try:
        found = json.loads(description.read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RecipeError(f"{description}: is damaged; delete it and start again to make the features anew")
    for key, meaning in (
        ("vision", "another image encoder"), ("pictures", "other images"), ("dtype", "another data.features_dtype"),
    ):  # fmt: skip
        if found.get(key) != header[key]:
            raise RecipeError(
                f"{description}: these features were made for {meaning}; delete them or name another folder as "
                "data.features"
            )
    return found.get("pixels")
