"""Rows that name or hold an image each: from one file, or from several with the same columns.

The key of an image is the name in its row; if that is not unique, the value of a key column, or the row number. All
rows are read once on opening, without the bytes of images.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from blip2.collection.record import Record, Unit
from blip2.collection.sources.fields import (
    caption_column_of,
    image_column_of,
    image_of,
    is_address,
    label_of,
    text_of,
)
from blip2.collection.sources.tables import HEAD_ROWS, Row, Table
from blip2.disk import stamp_of
from blip2.errors import CollectionError, option
from blip2.image import name_of

UNIT_ROWS = 256
KEY_COLUMN = "key"
NUMBERS = "row"
"""Value of ``key_column`` that numbers the rows."""


class Rows:
    """``image_column`` and ``caption_column`` are detected if not named. ``key_column`` holds the key of each row;
    "row" numbers them. ``images``: base folder of paths, by default that of their file. Raises CollectionError for
    files that cannot be read, have no image, or have duplicate keys."""

    def __init__(
        self,
        tables: Sequence[Table],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        key_column: str | None = None,
        images: str | None = None,
    ) -> None:
        self.tables = tables
        self._images = images
        self.image_column = image_column_of(tables, image_column)
        self.caption_column = caption_column_of(tables, caption_column, self.image_column)
        self._ahead: dict[tuple[str, int], Iterator[Row]] = {}
        self._table = {table.path: table for table in tables}
        self._first: dict[str, int] = {}  # the number of each table's first row
        self.units: list[Unit] = []
        self._stamps: list[str] = []
        self._key_column = self._look(key_column)
        if not self.num_records:
            raise CollectionError(f"{_names(tables)}: no rows in it")

    def stamp(self, unit: Unit) -> str:
        return self._stamps[unit.number]

    def records(self, unit: Unit) -> Iterator[Record]:
        """Each unit continues where the one before it ended, so that a file is read once."""
        table = self._table[unit.place]
        rows = self._ahead.pop((unit.place, unit.start), None) or table.rows(unit.start)
        for number, row in enumerate(islice(rows, unit.stop - unit.start), start=self._first[unit.place] + unit.start):
            yield self._record(table, row, number)
        self._ahead = {(unit.place, unit.stop): rows}

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which read from the start."""
        return {**self.__dict__, "_ahead": {}}

    def description(self) -> Mapping[str, Any]:
        return {
            "source": "rows",
            "files": [os.path.abspath(table.path) for table in self.tables],
            "image_column": self.image_column,
            "key_column": self._key_column or "",
        }

    # ---- one row ----

    def _record(self, table: Table, row: Row, number: int) -> Record:
        value = _value(row, self.image_column)
        image, problem = self._image(value, table)
        text, wrong_text = text_of(_value(row, self.caption_column)) if self.caption_column else ("", "")
        reason = row.problem or problem or wrong_text
        stamp = _stamp(image)
        if isinstance(image, str) and not reason and not is_address(image):
            reason = "" if stamp else f"{name_of(image)}: no such file; fix the row, or the path"
        name = image if isinstance(image, str) else row.name
        columns = {name: value for name, value in row.values.items() if name != self.image_column}
        if reason:
            image, reason = None, f"{row.name}: {reason}"
        return Record(self._key(row, number), image, name, stamp, text, columns, reason)

    def _image(self, value: object, table: Table) -> tuple[str | bytes | None, str]:
        """The image with its full path, and the problem if there is none."""
        image, problem = image_of(value, self.image_column)
        return (self._path(image, table) if isinstance(image, str) else image), problem

    def _path(self, name: str, table: Table) -> str:
        if is_address(name):
            return name
        path = os.path.join(self._images if self._images is not None else os.path.dirname(table.path), name)
        if "\\" in name and not os.path.lexists(path):  # a path written on Windows
            return path.replace("\\", "/")
        return path

    def _key(self, row: Row, number: int) -> str:
        if self._key_column == NUMBERS:
            return f"{number:09}"
        name = self._label(row) if self._key_column is None else _own_key(row, self._key_column)
        return f"row-{number:09}" if name is None or row.problem else name

    def _label(self, row: Row) -> str | None:
        return label_of(_value(row, self.image_column))

    # ---- all of them ----

    def _look(self, key_column: str | None) -> str | None:
        """Divides the rows into units, and chooses the keys: a column, `NUMBERS`, or None for the names of images."""
        wanted = key_column or KEY_COLUMN
        own, labels, holds_files, number = _Names(), _Names(), False, 0
        for table in self.tables:
            self._first[table.path], start = number, number
            digest = blake2b(table.stamp.encode(), digest_size=16)
            for row in table.looked([self.image_column, wanted] if wanted in table.columns else [self.image_column]):
                value = _value(row, self.image_column)
                if not row.problem:
                    own.add(_own_key(row, wanted))
                labels.add(label := label_of(value))
                digest.update(repr((row.values, row.problem)).encode("utf-8", "surrogatepass"))
                if label is not None and self.image_column not in table.holding_bytes:
                    holds_files = True
                    digest.update(_stamp(self._image(value, table)[0]).encode())
                number += 1
                if (number - self._first[table.path]) % UNIT_ROWS == 0:
                    self._add_unit(table, start, number, digest.hexdigest())
                    start, digest = number, blake2b(table.stamp.encode(), digest_size=16)
            if number > start:
                self._add_unit(table, start, number, digest.hexdigest())
        self.num_records = number
        if holds_files:
            self._refuse_all_absent()
        if key_column == NUMBERS:
            return NUMBERS
        if key_column:
            if own.num_missing:
                self._refuse_missing(key_column)
            self._refuse_repeated(own, lambda row: _own_key(row, wanted), f"have the same {key_column!r}")
            return key_column
        if not own.num_missing and not own.repeated():
            return KEY_COLUMN
        if holds_files:
            self._refuse_repeated(labels, self._label, "are of the same image")
            return None
        return NUMBERS if labels.num_missing or labels.repeated() else None

    def _add_unit(self, table: Table, start: int, stop: int, stamp: str) -> None:
        first = self._first[table.path]
        self.units.append(Unit(len(self.units), table.path, start - first, stop - first))
        self._stamps.append(stamp)

    def _refuse_repeated(self, names: _Names, of: Callable[[Row], str | None], what: str) -> None:
        if not (repeated := names.repeated()):
            return
        seen: dict[str, str] = {}
        for table in self.tables:
            for row in table.looked(table.columns):
                name = of(row)
                if name is None or hash(name) not in repeated:
                    continue
                if name in seen:
                    raise CollectionError(
                        f"{seen[name]} and {row.name} {what}, {name_of(name)}; remove one of them, or "
                        f"name a unique column with {option('key_column')} ({NUMBERS!r} numbers the rows)"
                    )
                seen[name] = row.name

    def _refuse_missing(self, column: str) -> None:
        for table in self.tables:
            for row in table.looked(table.columns):
                if not row.problem and _own_key(row, column) is None:
                    raise CollectionError(
                        f"{row.name}: {column!r} is empty, which {option('key_column')} names; fill it, or "
                        f"give {NUMBERS!r} to number the rows"
                    )

    def _refuse_all_absent(self) -> None:
        """Detects a wrong image folder before a model is loaded."""
        paths = []
        table = self.tables[0]
        for row in islice(table.looked([self.image_column]), HEAD_ROWS):
            image, _ = self._image(_value(row, self.image_column), table)
            if isinstance(image, str) and (is_address(image) or os.path.lexists(image)):
                return
            paths += [image] if isinstance(image, str) else []
        if paths:
            raise CollectionError(
                f"{_names(self.tables)}: none of the images of its first rows exists (such as {name_of(paths[0])})"
                f"; name their folder with {option('images')}"
            )


class _Names:
    """Finds repeated names among very many, with 8 bytes each."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self.num_missing = 0

    def add(self, name: str | None) -> None:
        if name is None:
            self.num_missing += 1
        else:
            self._hashes.append(hash(name))

    def repeated(self) -> set[int]:
        """The hashes of repeated names."""
        ordered = np.sort(np.frombuffer(self._hashes, np.int64)) if self._hashes else np.empty(0, np.int64)
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _value(row: Row, column: str) -> Any:
    return row.values.get(column)


def _own_key(row: Row, column: str) -> str | None:
    value = row.values.get(column)
    return None if value is None or value == "" or isinstance(value, dict | list | bytes) else str(value)


def _stamp(image: str | bytes | None) -> str:
    match image:
        case None:
            return ""
        case bytes():
            return blake2b(image, digest_size=16).hexdigest()
        case _ if is_address(image):
            return blake2b(image.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    found = stamp_of(image)
    return "" if found is None else f"{found.size}-{found.mtime_ns}"


def _names(tables: Sequence[Table]) -> str:
    return tables[0].path if len(tables) == 1 else f"{tables[0].path} and {len(tables) - 1} more"
