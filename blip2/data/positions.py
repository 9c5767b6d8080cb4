"""Where the rows of large files begin: found once, kept on the disk, and read a place at a time.

A file of positions has a `RECORD` for each row, and at its end, as JSON, what it was made of.
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
"""Bytes ``start`` to ``start + size`` of a file; ``crc32`` of the row's number and of all before."""
LENGTH_BYTES = 8
LARGEST_TOLD = 2**28
KEPT_RECORDS = 2**16
WAIT_S = 0.2


class Position(NamedTuple):
    file: int
    start: int
    size: int


class LeftOut(NamedTuple):
    """A row that cannot be used."""

    reason: str
    place: str


class Positions:
    """``left_out``: by reason, how many rows, and where the first is. Read by any thread, never as a whole."""

    def __init__(self, path: Path, told: dict[str, Any]) -> None:
        self.left_out: dict[str, tuple[int, str]] = {name: tuple(what) for name, what in told["left_out"].items()}
        self._count: int = told["count"]
        self._file = disk.OpenFile(path)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Position:
        """Raises RecipeError for what is damaged."""
        content = bytearray(RECORD.itemsize)
        try:
            self._file.read(number * RECORD.itemsize, memoryview(content))
            [record] = np.frombuffer(content, RECORD)
            if record["crc32"] != _crc32(number, content):
                raise OSError("it is not what was written")
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(
                f"{self._file.path}: is damaged ({reason}); delete it, and start again: it is made anew"
            ) from None
        return Position(int(record["file"]), int(record["start"]), int(record["size"]))


def kept_positions(
    path: Path, of: dict[str, Any], find: Callable[[], Iterator[Position | LeftOut]]
) -> tuple[Positions, bool]:
    """Those in ``path`` if they are ``of`` this, a JSON object; else they are found, and kept there. And whether they
    had to be found. Where another process finds them, its end is waited for. Raises RecipeError.
    """
    of = json.loads(json.dumps(of))
    try:
        while (told := _told(path, of)) is None:
            try:
                with disk.locked(path.with_suffix(".lock")):
                    if _told(path, of) is None:  # another may just have ended
                        _write(path, of, find())
                        return Positions(path, _told(path, of) or {}), True
            except BlockingIOError:
                time.sleep(WAIT_S)
        return Positions(path, told), False
    except OSError as error:
        raise RecipeError(
            f"{path}: where the rows are cannot be kept there ({error.strerror or error}); make room, or name another "
            "folder as 'out'"
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
        told = json.dumps({"of": of, "count": count, "left_out": left_out}).encode()
        file.write(some + told + len(told).to_bytes(LENGTH_BYTES, "little"))


def _told(path: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """What stands at the end; None if there is no such file, it is damaged, or of something else."""
    try:
        with path.open("rb") as file:
            end = file.seek(-LENGTH_BYTES, 2)
            length = int.from_bytes(file.read(), "little")
            if length > min(end, LARGEST_TOLD):
                return None
            file.seek(end - length)
            told = json.loads(file.read(length))
            return told if told["count"] * RECORD.itemsize == end - length and told["of"] == of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc32(number: int, record: bytes | bytearray) -> int:
    return zlib.crc32(memoryview(record)[:-4], number & 0xFFFFFFFF)
