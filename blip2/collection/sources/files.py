"""Folders and lists of files: a unit is a run of files, its stamp that of all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2.collection.record import Record, Unit
from blip2.disk import stamp_of
from blip2.plaintext import NotTextError, read_text

UNIT_FILES = 256


class Files:
    """Pictures by their paths, in order. ``root``: that keys begin from; ``text_suffix``: of the files beside them that
    hold what was said of them before ("" if none do)."""

    def __init__(self, paths: Sequence[str], *, root: str = "", text_suffix: str = "") -> None:
        self.paths = paths
        self.root = root
        self.text_suffix = text_suffix

    @property
    def num_records(self) -> int:
        return len(self.paths)

    @cached_property
    def units(self) -> list[Unit]:
        starts = range(0, len(self.paths), UNIT_FILES)
        return [
            Unit(number, self.root, start, min(start + UNIT_FILES, len(self.paths)))
            for number, start in enumerate(starts)
        ]

    def stamp(self, unit: Unit) -> str:
        return self._stamps[unit.number]

    def records(self, unit: Unit) -> Iterator[Record]:
        for path in self.paths[unit.start : unit.stop]:
            text, problem = self._text(path)
            yield Record(self.key(path), path, path, _stamp(path), text, problem=problem)

    def told(self) -> Mapping[str, Any]:
        return {"source": "files", "root": os.path.abspath(self.root) if self.root else ""}

    def key(self, path: str) -> str:
        return os.path.relpath(path, self.root) if self.root else path

    @cached_property
    def _stamps(self) -> list[str]:
        """Each unit's, from the names, sizes and times of its files; taken once, so that a picture that changes while
        the run is at work is done again by the next."""
        found = []
        for unit in self.units:
            digest = hashlib.blake2b(digest_size=16)
            for path in self.paths[unit.start : unit.stop]:
                digest.update(os.fsencode(f"{self.key(path)}\0{_stamp(path)}\0"))
            found.append(digest.hexdigest())
        return found

    def _text(self, path: str) -> tuple[str, str]:
        """What is said of a picture beside it, and what is wrong with that."""
        if not self.text_suffix:
            return "", ""
        beside = Path(path).with_suffix(self.text_suffix)
        try:
            return " ".join(read_text(beside).split()), ""
        except FileNotFoundError:
            return "", ""
        except (OSError, NotTextError) as error:
            return "", f"{beside}: cannot be read ({error}); mend or remove it"


def _stamp(path: str) -> str:
    found = stamp_of(path)
    return "" if found is None else f"{found.size}-{found.mtime_ns}"
