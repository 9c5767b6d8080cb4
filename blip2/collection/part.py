"""Results as lines of a file whose last line may be torn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from blip2.collection.record import Result

NEEDED = ("key", "stamp", "status")
"""Fields of a result that are stored even if empty: an image that does not exist has no stamp."""


class Part:
    """The results of a unit in progress."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._there: set[tuple[str, str]] = set()

    def add(self, result: Result, *, is_new: bool) -> None:
        """Append a result. Raises OSError if the disk is full. A result that is not new is stored only once."""
        if self._file is None:
            self._there = {(before.key, before.stamp) for before in sound(self._path)}
            self._drop_torn()
            self._file = open(self._path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        if is_new or (result.key, result.stamp) not in self._there:
            self._file.write(line_of(result))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _drop_torn(self) -> None:
        with suppress(FileNotFoundError), open(self._path, "rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def line_of(result: Result) -> str:
    content = {
        name: value for name, value in asdict(result).items() if name in NEEDED or value not in ("", (), [], {}, 0)
    }
    return json.dumps(content) + "\n"


def result_of(line: str) -> Result:
    return Result(**json.loads(line))


def sound(path: Path) -> Iterator[Result]:
    """The results in a file whose last line may be torn; none if it does not exist."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                if line.endswith("\n") and "key" in (found := json.loads(line)):
                    yield Result(**found)
