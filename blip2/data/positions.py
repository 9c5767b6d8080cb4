"""The positions of rows in large files: found once, stored on disk, and read one at a time.

A file of positions has a `RECORD` for each row, and at its end a JSON object that describes its origin.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip2 import disk
from blip2.errors import RecipeError

RECORD = np.dtype([("start", "<u8"), ("size", "<u8"), ("file", "<u4"), ("crc32", "<u4")])
"""Bytes ``start`` to ``start + size`` of a file; ``crc32`` of the row number and all fields before."""
LENGTH_BYTES = 8
MAX_LENGTH = 2**28
KEPT_RECORDS = 2**16
WAIT_S = 0.2


class Position(NamedTuple):
    file: int
    start: int
    size: int


class LeftOut(NamedTuple):
    """An unusable row."""

    reason: str
    place: str


class Positions:
    """``left_out``: for each reason the number of rows and the place of the first. Thread-safe, and never read as a
    whole."""

    def __init__(self, path: Path, footer: dict[str, Any]) -> None:
        self.left_out: dict[str, tuple[int, str]] = {name: tuple(what) for name, what in footer["left_out"].items()}
        self._count: int = footer["count"]
        self._file = disk.OpenFile(path)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Position:
        """Raises RecipeError for damaged data."""
        content = bytearray(RECORD.itemsize)
        try:
            self._file.read(number * RECORD.itemsize, memoryview(content))
            [record] = np.frombuffer(content, RECORD)
            if record["crc32"] != _crc32(number, content):
                raise OSError("wrong checksum")
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(
                f"{self._file.path}: is damaged ({reason}); delete it and start again to make it anew"
            ) from None
        return Position(int(record["file"]), int(record["start"]), int(record["size"]))


def kept_positions(
    path: Path, of: dict[str, Any], find: Callable[[], Iterator[Position | LeftOut]]
) -> tuple[Positions, bool]:
    """The positions in ``path`` if they were made from ``of``, a JSON object; else find them and store them there. Also
    returns whether they had to be found. If another process is finding them, waits for it. Raises RecipeError."""
    of = json.loads(json.dumps(of))
    try:
        while (footer := _footer(path, of)) is None:
            try:
                with disk.locked(path.with_suffix(".lock")):
                    if _footer(path, of) is None:  # another process may just have finished
                        _write(path, of, find())
                        return Positions(path, _footer(path, of) or {}), True
            except BlockingIOError:
                time.sleep(WAIT_S)
        return Positions(path, footer), False
    except OSError as error:
        raise RecipeError(
            f"{path}: the positions of the rows cannot be written ({error.strerror or error}); free some space, or "
            "name another folder as 'out'"
        ) from None


def _write(path: Path, of: dict[str, Any], found: Iterator[Position | LeftOut]) -> None:
    count, left_out = 0, dict[str, tuple[int, str]]()
    with disk.written(path) as unfinished, unfinished.open("wb") as file:
        some = bytearray()
        for what in found:
            if isinstance(what, LeftOut):
                before, first = left_out.get(what.reason, (0, what.place))
                left_out[what.reason] = (before + 1, first)
                continue
            record = np.array([(what.start, what.size, what.file, 0)], RECORD)
            record["crc32"] = _crc32(count, record.tobytes())
            some += record.tobytes()
            count += 1
            if count % KEPT_RECORDS == 0:
                file.write(some)
                some.clear()
        footer = json.dumps({"of": of, "count": count, "left_out": left_out}).encode()
        file.write(some + footer + len(footer).to_bytes(LENGTH_BYTES, "little"))


def _footer(path: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON object at the end; None if the file is missing, damaged, or of another origin."""
    try:
        with path.open("rb") as file:
            end = file.seek(-LENGTH_BYTES, 2)
            length = int.from_bytes(file.read(), "little")
            if length > min(end, MAX_LENGTH):
                return None
            file.seek(end - length)
            footer = json.loads(file.read(length))
            return footer if footer["count"] * RECORD.itemsize == end - length and footer["of"] == of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc32(number: int, record: bytes | bytearray) -> int:
    return zlib.crc32(memoryview(record)[:-4], number & 0xFFFFFFFF)
