"""A text file beside each picture, as trainers of LoRAs read it: UTF-8, one line a caption, never empty."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from blip2.collection.record import Result, Source, Unit
from blip2.collection.sources.files import Files
from blip2.disk import write_text
from blip2.errors import CollectionError


class Sidecars:
    """``suffix``: ".txt", ".caption". ``keeps_suffix``: a.jpg.txt in the place of a.txt."""

    def __init__(self, root: str, suffix: str, *, keeps_suffix: bool = False) -> None:
        self._root = root
        self._suffix = suffix
        self._keeps_suffix = keeps_suffix

    def check(self, source: Source) -> None:
        if not isinstance(source, Files):
            raise CollectionError("--sidecar writes beside files; for rows and shards give -o")
        pictures: dict[Path, list[str]] = defaultdict(list)
        for picture in source.paths:
            pictures[self.path(picture)].append(picture)
        for path, some in pictures.items():
            if len(some) > 1:
                raise CollectionError(
                    f"{path}: would hold the captions of {' and '.join(map(str, some))}; add --sidecar-name full for "
                    f"{some[0]}{self._suffix}, or rename one of them"
                )

    def path(self, picture: str) -> Path:
        return Path(picture + self._suffix) if self._keeps_suffix else Path(picture).with_suffix(self._suffix)

    def one(self, result: Result) -> None:
        write_text(self.path(result.name), result.text + "\n")

    def unit(self, unit: Unit, results: Sequence[Result]) -> None:
        pass

    def whole(self, results: Iterator[Result]) -> None:
        pass
