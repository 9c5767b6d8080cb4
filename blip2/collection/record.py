"""What goes through a run: records, the units that they come in, and the results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

SUCCESS, FAILED, SKIPPED = "success", "failed", "skipped"
"""As img2dataset has them; an image is skipped that had a text already."""


@dataclass(frozen=True, slots=True)
class Record:
    """An image of a collection.

    ``key``: by which it is known in the outputs, unique in its source: the path within the folder, the key in a shard,
    the number of a row. ``picture``: a path, an address, or the bytes of an image file; None if ``problem`` says why
    there is none. ``name``: what messages call it. ``stamp``: another one, and it is another image under this key.
    ``text``: what was said of it before, "" if nothing. ``columns``: all else that its source says of it. ``asked``:
    what is asked about it, where that is not the same for all. ``is_new``: ``text`` is said elsewhere than where the
    new one is written, which writes nothing over.
    """

    key: str
    picture: str | bytes | None
    name: str
    stamp: str
    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    asked: str = ""
    is_new: bool = False

    @property
    def is_described(self) -> bool:
        """Whether what would be written is there already, as `Job.skips` has it."""
        return bool(self.text) and not self.is_new


@dataclass(frozen=True, slots=True)
class Unit:
    """``number``: its place in the source. ``place``: the shard's file, or the folder. ``start`` and ``stop``: which of
    the records there; all of them if ``stop`` is 0."""

    number: int
    place: str
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        return f"{self.number:06}"


def runs_of(number: int, size: int, place: str = "") -> list[Unit]:
    """Units of ``size`` records each, the last one shorter, of so many records in one place."""
    return [
        Unit(index, place, start, min(start + size, number)) for index, start in enumerate(range(0, number, size))
    ]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a record. All of it depends on the image, the model and the options alone.

    ``captions``: those of the model, the best first, before any wording; ``scores`` and ``tokens`` of each. ``text``:
    what the outputs have, a line for each caption; most have the first alone, `line`. ``old``: what was said of the
    image before. ``path``: its file, or its address, "" if it has none of its own. ``width``, ``height``: as stored,
    before any turn; 0 if no output wants them, or they are not known; ``sha256`` of the file, "" likewise. ``columns``:
    all else that its source says of it, as JSON can have it. ``copy_of``: the key of an equal image, whose captions
    these are; "" if the model saw this one.
    """

    key: str
    stamp: str
    status: str
    name: str = ""
    text: str = ""
    captions: Sequence[str] = ()
    scores: Sequence[float] = ()
    tokens: Sequence[int] = ()
    old: str = ""
    error_message: str = ""
    path: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    copy_of: str = ""

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line]

    @property
    def line(self) -> str:
        """"" if there is none."""
        return next(iter(self.lines), "")


class Source(Protocol):
    """Where records come from. What is wrong with one record is its ``problem``; what is wrong with the source itself
    is an OptionError when it is opened."""

    @property
    def units(self) -> Sequence[Unit]: ...

    @property
    def num_records(self) -> int | None:
        """None if that is not known before they are read."""

    def stamp(self, unit: Unit) -> str:
        """Another one, and the unit has to be looked at again. Cheap: no image is opened."""

    def records(self, unit: Unit) -> Iterator[Record]:
        """In an order that is always the same."""

    def told(self) -> Mapping[str, Any]:
        """What distinguishes this source from another, for `Journal.begin`."""


def sha256_of(picture: str | bytes) -> str:
    """Of an image's file, as hexadecimal digits; "" if it cannot be read."""
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    with suppress(OSError), open(picture, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""
