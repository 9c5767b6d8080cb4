"""The data of a run: records, units of them, and results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

SUCCESS, FAILED, SKIPPED = "success", "failed", "skipped"
"""Statuses, named as in img2dataset. Skipped: the image already had a text."""


@dataclass(frozen=True, slots=True)
class Record:
    """An image of a collection.

    ``key``: identifies it in the outputs and is unique in its source: the path within the folder, the key in a shard,
    or the row number. ``image``: a path, a URL, or the bytes of an image file; None if ``problem`` says why there is
    none. ``name``: used in messages. ``stamp``: if it changes, the image under this key is another one. ``text``: the
    existing text of the image, "" if none. ``columns``: the other columns of the source. ``asked``: its question, if
    questions differ. ``is_new``: ``text`` stands somewhere else than the new text will, so that nothing is overwritten.
    """

    key: str
    image: str | bytes | None
    name: str
    stamp: str
    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    asked: str = ""
    is_new: bool = False

    @property
    def is_described(self) -> bool:
        """Whether the text to be written already exists, in the sense of `Job.skips`."""
        return bool(self.text) and not self.is_new


@dataclass(frozen=True, slots=True)
class Unit:
    """``number``: its position in the source. ``place``: the shard's file, or the folder. ``start`` and ``stop``: the
    range of its records there; all of them if ``stop`` is 0."""

    number: int
    place: str
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        return f"{self.number:06}"


def runs_of(number: int, size: int, place: str = "") -> list[Unit]:
    """Units of ``size`` records each (the last may be shorter), for ``number`` records in one place."""
    return [
        Unit(index, place, start, min(start + size, number)) for index, start in enumerate(range(0, number, size))
    ]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a record. It depends only on the image, the model and the options.

    ``captions``: the generated texts, best first, before any wording, with ``scores`` and ``tokens`` of each. ``text``:
    the text of the outputs, one line per caption; most outputs use only the first, `line`. ``old``: the earlier text.
    ``path``: its file or URL, "" if it has none of its own. ``width``, ``height``: in pixels as stored, before any
    rotation; 0 if no output needs them or they are unknown. ``sha256``: of the file, "" likewise. ``columns``: the
    other columns of the source, as JSON values. ``copy_of``: the key of an equal image whose captions these are; "" if
    the model processed this one.
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
        """The first line; "" if there is none."""
        return next(iter(self.lines), "")


class Source(Protocol):
    """Where records come from. A problem of one record is its ``problem``; a problem of the source itself is an
    OptionError when it is opened."""

    @property
    def units(self) -> Sequence[Unit]: ...

    @property
    def num_records(self) -> int | None:
        """The number of records; None if it is unknown before they are read."""

    def stamp(self, unit: Unit) -> str:
        """If it changes, the unit has to be processed again. Cheap: opens no image."""

    def records(self, unit: Unit) -> Iterator[Record]:
        """The records, always in the same order."""

    def description(self) -> Mapping[str, Any]:
        """The values that distinguish this source from another, for `Journal.begin`."""


def sha256_of(image: str | bytes) -> str:
    """The SHA-256 of an image file as hexadecimal digits; "" if it cannot be read."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    with suppress(OSError), open(image, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""
