"""Files of rows, with a reader for each format: JSON lines, a JSON array, or delimited cells.

A broken row is a `Row` with a problem, and the following rows are read. A file that cannot be read further is a
CollectionError.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blip2.errors import CollectionError
from blip2.plaintext import NotTextError, read_lines, read_text

HEAD_ROWS = 64
"""Number of rows that are read to find out what the columns hold."""
LARGEST_JSON = 2**31
"""Maximum bytes of a file that is one JSON value, which is held in memory as a whole."""
LARGEST_CELL = 2**28
"""Characters per cell. Python's own limit is smaller than an image in a data URL."""
SEPARATORS = (",", "\t", ";", "|")


@dataclass(frozen=True, slots=True)
class Row:
    """``name``: used in messages, includes the file. ``problem``: why it has no values."""

    name: str
    values: Mapping[str, Any]
    problem: str = ""


class Table(ABC):
    """Rows of one file. ``columns``: their names, from the first rows. ``holding_bytes``: columns that hold file
    contents, not file names. ``stamp``: covers what `looked` leaves out."""

    path: str
    columns: Sequence[str]
    holding_bytes: Sequence[str] = ()
    stamp: str = ""

    @abstractmethod
    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from number ``start`` on. Raises CollectionError where the file cannot be read."""

    def looked(self, columns: Sequence[str]) -> Iterator[Row]:
        """All rows, with at least these columns; the bytes of images may be left out."""
        return self.rows()


class JsonRows(Table):
    """Objects in memory, from a JSON array or another tool's annotations; a text instead of an object is the problem of
    that row."""

    def __init__(self, path: str, values: Sequence[object]) -> None:
        self.path = path
        self._values = values
        self.columns = _columns(self)

    def rows(self, start: int = 0) -> Iterator[Row]:
        for number, value in enumerate(self._values[start:], start=start):
            name = f"{self.path} [{number}]"
            if isinstance(value, dict):
                yield Row(name, value)
            else:
                yield Row(name, {}, value if isinstance(value, str) else "it is not an object")


class JsonLines(Table):
    """One object per line; empty lines are skipped."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.columns = _columns(self)

    def rows(self, start: int = 0) -> Iterator[Row]:
        return islice(self._rows(), start, None)

    def _rows(self) -> Iterator[Row]:
        with reading(self.path):
            for number, line in enumerate(read_lines(Path(self.path)), start=1):
                if line.strip():
                    yield _json_row(f"{self.path}:{number}", line)


class Cells(Table):
    """Lines of cells; the first line names the columns. Cells are texts, unchanged: also "None" and "007"."""

    def __init__(self, path: str, separator: str) -> None:
        self.path = path
        self._separator = separator
        with reading(path):
            self.columns = next((cells for _, cells in self._cells()), [])
        if repeated := {name for name in self.columns if self.columns.count(name) > 1}:
            raise CollectionError(f"{path}: several columns are named {min(repeated)!r}; names have to be unique")

    def rows(self, start: int = 0) -> Iterator[Row]:
        return islice(self._rows(), start, None)

    def _rows(self) -> Iterator[Row]:
        with reading(self.path):
            for line, cells in islice(self._cells(), 1, None):
                name, wanted = f"{self.path}:{line}", len(self.columns)
                if len(cells) == wanted:
                    yield Row(name, dict(zip(self.columns, cells, strict=True)))
                else:
                    yield Row(name, {}, f"it has {len(cells)} cells, and the first line has {wanted}; fix it")

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        """The cells of each row, with the number of its first line."""
        csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
        reader = csv.reader(read_lines(Path(self.path)), delimiter=self._separator, strict=True)
        line = 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise CollectionError(f"{self.path}:{line}: cannot be read further ({error}); fix the quotes") from None


def separator_of(path: str, is_known: Callable[[str], bool]) -> str | None:
    """The separator with which some cell of the first line is a name for which ``is_known`` is true; None if there is
    none. Raises CollectionError."""
    with reading(path):
        try:
            first = next((line for line in read_lines(Path(path)) if line.strip()), "")
        except NotTextError:
            return None
    for separator in SEPARATORS:
        try:
            cells = next(csv.reader([first], delimiter=separator), [])
        except csv.Error:
            continue
        if any(is_known(cell) for cell in cells):
            return separator
    return None


def commonest_separator(path: str) -> str:
    """The most frequent separator in the first line. Raises CollectionError."""
    with reading(path):
        first = next(read_lines(Path(path)), "")
    return max(SEPARATORS, key=first.count)


def read_json(path: str) -> object:
    """The value of a file that is one JSON value. Raises CollectionError."""
    with reading(path):
        if Path(path).stat().st_size > LARGEST_JSON:
            raise CollectionError(f"{path}: is too large to read at once; write one object per line (jq -c '.[]' FILE)")
        try:
            return parsed(read_text(Path(path)))
        except NotTextError:
            raise
        except ValueError as error:
            raise CollectionError(f"{path}: {error}; fix or remove it") from None


def parsed(text: str) -> Any:
    """A JSON value. Raises ValueError with the problem."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("is JSON that is nested too deeply") from None
    if "\\u" in text:
        try:  # file names that are not UTF-8 look like this
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError("has lone surrogates (such as \\ud800); write it as Unicode") from None
    return value


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Errors within are CollectionErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise CollectionError(f"{path}: cannot be read ({error.strerror or error}); check it") from None
    except NotTextError as error:
        raise CollectionError(f"{path}: {error}") from None


def _json_row(name: str, line: str) -> Row:
    try:
        value = parsed(line)
    except ValueError as error:
        return Row(name, {}, str(error))
    if isinstance(value, dict):
        return Row(name, value)
    return Row(name, {}, 'it is not an object such as {"image": "a.jpg"}')


def _columns(table: Table) -> list[str]:
    """The columns of the first rows."""
    return list(dict.fromkeys(name for row in islice(table.rows(), HEAD_ROWS) for name in row.values))
