"""One file for all: a JSON object a line, as `datasets` reads it beside the pictures (ImageFolder)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from blip2.collection.record import FAILED, Result, Source, Unit
from blip2.disk import written


class JsonLines:
    """``file_name`` and ``text`` of each picture that has one, and more."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, source: Source) -> None:
        pass

    def one(self, result: Result) -> None:
        pass

    def unit(self, unit: Unit, results: Sequence[Result]) -> None:
        pass

    def whole(self, results: Iterator[Result]) -> None:
        with written(self._path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            for result in results:
                if result.status != FAILED:
                    row = {"file_name": result.key, "text": result.text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
