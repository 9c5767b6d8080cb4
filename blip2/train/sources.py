"""Collections as training data: shards, parquet, folders and rows of other tools, each image with its texts.

Rows inside large files (shards, parquet, JSON lines) are read in place, by positions that are found once. Rows of other
sources are held in memory, with their images in separate files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import escape, has_magic
from pathlib import Path
from typing import Any, Protocol

from blip2.collection.record import Record, Source, Unit
from blip2.collection.sources import Rows, Shards, open_source
from blip2.collection.sources.fields import is_address
from blip2.collection.sources.opening import places_of
from blip2.data import Row
from blip2.data.joined import Dataset, Joined, Listed
from blip2.data.jsonl import row_of_line
from blip2.data.positions import LeftOut, Position, Positions, kept_positions
from blip2.data.sample import parse_row
from blip2.disk import OpenFile, stamp_of
from blip2.errors import Blip2Error, CollectionError, ImageError, RecipeError
from blip2.train.recipes import SourceRecipe

VERSION = 1
"""To be raised when the same files give different rows."""
MOST_OPEN = 128
REPORT_EVERY_ROWS = 100_000
"""Number of rows between progress messages of the search."""
OWN = ("captions", "caption", "text", "question", "answer", "answers", "questions", "dialogues")

Usable = Callable[[Row], bool]
Tell = Callable[[str], None]


def open_sources(
    sources: Sequence[SourceRecipe],
    folder: Path,
    *,
    keep: Path,
    kinds: Sequence[str],
    tell: Tell,
    change: Callable[[Row], Row] = lambda row: row,
) -> list[Row] | Joined:
    """Open sources. ``folder``: names are relative to it; ``keep``: folder for positions; ``kinds``: fields of `Row`
    that can be trained on ("captions", ...). Rows without any of them are left out, which ``tell`` reports. ``change``
    is applied to each row. A single source whose images have files of their own becomes a list. Raises RecipeError."""
    opened = [_opened(source, folder, keep, kinds, tell) for source in sources]
    if len(opened) == 1 and isinstance(listed := opened[0], Listed):
        return list(map(change, listed.rows))
    return Joined(opened, [source.weight for source in sources], change=change)


def _opened(source: SourceRecipe, folder: Path, keep: Path, kinds: Sequence[str], tell: Tell) -> Dataset:
    names = [_within(folder, name) for name in source.source]

    def is_usable(row: Row) -> bool:
        return any(getattr(row, kind) for kind in kinds)

    try:
        places = list(dict.fromkeys(place for name in names for place in places_of(name)))
        if _are_own_lines(places) and not (source.image or source.text or source.question):
            dataset: _Sought = Lines(places, source.images)
        else:
            opened = open_source(
                places, image_column=source.image, caption_column=source.text, split=source.split, key_column="row",
                images=None if source.images is None else str(source.images), caption_suffix=".txt",
            )  # fmt: skip
            if isinstance(opened, Shards):
                dataset = InShards(opened, source)
            elif isinstance(opened, Rows) and opened.image_column in opened.tables[0].holding_bytes:
                dataset = InRows(opened, source)
            else:
                return _listed(opened, source, is_usable, names[0], kinds, tell)
        fields = [source.image, source.text, source.question, source.answer, str(source.images)]
        name = hashlib.sha256(json.dumps([places, fields, kinds]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        of = {
            "version": VERSION, "kinds": kinds, "fields": fields,
            "files": [[path, *(stamp_of(path) or ())] for path in dataset.paths],
        }  # fmt: skip
        found = partial(_watched, dataset, is_usable, names[0], tell)
        positions, is_new = kept_positions(keep / f"{name}.positions", of, found)
    except RecipeError:
        raise
    except Blip2Error as error:
        raise RecipeError(f"data.sources: {error}") from None
    if not len(positions):
        raise RecipeError(f"data.sources: {names[0]}: no rows to train on ({_reasons(positions.left_out, kinds)})")
    if is_new:
        tell(f"{names[0]}: {len(positions):,} rows{_left_out_note(positions.left_out)}")
    dataset.positions = positions
    return dataset


def _watched(dataset: _Sought, is_usable: Usable, name: str, tell: Tell) -> Iterator[Position | LeftOut]:
    try:
        for count, what in enumerate(dataset.find(is_usable), start=1):
            yield what
            if count % REPORT_EVERY_ROWS == 0:
                tell(f"{name}: finding its rows, {count:,} so far")
    except OSError as error:
        raise RecipeError(f"data.sources: {name}: cannot be read ({error.strerror or error}); check it") from None


def _within(folder: Path, name: str) -> str:
    if os.path.isabs(name) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):  # an address is refused later
        return name
    is_pattern = has_magic(name) and not os.path.lexists(folder / name)
    return os.path.join(escape(str(folder)) if is_pattern else str(folder), name)


def _listed(
    opened: Source, source: SourceRecipe, is_usable: Usable, name: str, kinds: Sequence[str], tell: Tell
) -> Listed:
    rows, left_out = [], dict[str, tuple[int, str]]()
    for unit in opened.units:
        for record in opened.records(unit):
            row = _row(record, source, is_usable)
            if isinstance(row, Row):
                rows.append(row)
            else:
                before, first = left_out.get(row.reason, (0, row.place))
                left_out[row.reason] = (before + 1, first)
    if not rows:
        raise RecipeError(f"data.sources: {name}: no rows to train on ({_reasons(left_out, kinds)})")
    tell(f"{name}: {len(rows):,} rows{_left_out_note(left_out)}")
    return Listed(rows)


def _left_out_note(left_out: Mapping[str, tuple[int, str]]) -> str:
    return "".join(f"; left out: {count:,}, {why}, the first is {first}" for why, (count, first) in left_out.items())


def _reasons(left_out: Mapping[str, tuple[int, str]], kinds: Sequence[str]) -> str:
    reasons = "; ".join(f"{count:,}: {why}, for example {first}" for why, (count, first) in left_out.items())
    return f"{reasons or 'it has none'}; needed are {' or '.join(kinds)}, see data.sources text, question, answer"


# ---- from a record to a row ----


def _row(record: Record, source: SourceRecipe, is_usable: Usable) -> Row | LeftOut:
    """A row from a record, or the reason why it is left out."""
    if record.problem:
        return LeftOut("cannot be read", record.problem)
    if isinstance(record.image, str) and is_address(record.image):
        return LeftOut("its image is a URL, which has to be downloaded first", record.name)
    try:
        row = row_of(record, source)
    except ValueError as error:
        return LeftOut("its texts cannot be used", f"{record.name}: {error}")
    return row if is_usable(row) else LeftOut("it has no text of the kind", record.name)


def row_of(record: Record, source: SourceRecipe) -> Row:
    """A row from a record. Texts come from the columns that ``source`` names; else from the names of a row's own
    fields; else from the record's caption. Raises ValueError for a text that is not a string."""
    columns = record.columns
    fields: dict[str, Any] = {"image": record.name if isinstance(record.image, bytes) else str(record.image)}
    if source.question is not None:
        answers = columns.get(source.answer or "answer")
        fields |= {"question": columns.get(source.question)}
        fields |= {"answers": answers} if isinstance(answers, list | dict) else {"answer": answers}
    if source.text is not None:
        captions = columns.get(source.text, record.text)
    else:
        captions = next((columns[name] for name in OWN[:3] if columns.get(name)), record.text)
        if source.question is None:
            fields |= {name: columns[name] for name in OWN[3:] if columns.get(name)}
    captions = captions if isinstance(captions, list) else [captions]
    fields["captions"] = [caption for caption in captions if caption]
    if fields.keys() == {"image", "captions"} and not fields["captions"]:
        return Row(fields["image"])
    row = parse_row(fields)
    content = record.image if isinstance(record.image, bytes) else None
    return Row(row.image, row.captions, row.questions, row.dialogues, content)


# ---- rows that are read in place ----


class _Sought(Dataset, Protocol):
    """Files to search. After `find` has found their rows and ``positions`` is set, the rows can be read."""

    positions: Positions

    @property
    def paths(self) -> Sequence[str]: ...

    def find(self, is_usable: Usable) -> Iterator[Position | LeftOut]: ...


class _Files:
    """Reads bytes of many files. If there are few, all stay open."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._open = [OpenFile(path, held=len(paths) <= MOST_OPEN) for path in paths]

    def read(self, position: Position) -> bytes:
        """Raises ImageError."""
        content = bytearray(position.size)
        try:
            self._open[position.file].read(position.start, memoryview(content))
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(
                f"{self.paths[position.file]}: cannot be read ({reason}); if it was changed, start again"
            ) from None
        return bytes(content)


class InShards:
    """Samples of webdataset shards, each read alone."""

    positions: Positions

    def __init__(self, shards: Shards, source: SourceRecipe) -> None:
        self._shards, self._source, self._files = shards, source, _Files(shards.paths)
        self.paths = shards.paths

    def __len__(self) -> int:
        return len(self.positions)

    def find(self, is_usable: Usable) -> Iterator[Position | LeftOut]:
        for unit in self._shards.units:
            for start, stop, record in self._shards.positions(unit):
                row = _row(record, self._source, is_usable)
                yield row if isinstance(row, LeftOut) else Position(unit.number, start, stop - start)

    def place(self, number: int) -> tuple[str, bool]:
        return self.paths[self.positions[number].file], False

    def read(self, number: int) -> Row:
        position = self.positions[number]
        record = self._shards.at(self.paths[position.file], self._files.read(position))
        return _read(record, self._source)


class InRows:
    """Rows of parquet files that contain their images. Reading a row skips the rows before it in its row group."""

    positions: Positions

    def __init__(self, rows: Rows, source: SourceRecipe) -> None:
        self._rows, self._source = rows, source
        self.paths = [table.path for table in rows.tables]

    def __len__(self) -> int:
        return len(self.positions)

    def find(self, is_usable: Usable) -> Iterator[Position | LeftOut]:
        for unit in self._rows.units:
            for number, record in enumerate(self._rows.records(unit), start=unit.start):
                row = _row(record, self._source, is_usable)
                yield row if isinstance(row, LeftOut) else Position(self.paths.index(unit.place), number, 1)

    def place(self, number: int) -> tuple[str, bool]:
        return self.paths[self.positions[number].file], False

    def read(self, number: int) -> Row:
        file, start, _ = self.positions[number]
        try:
            [record] = self._rows.records(Unit(0, self.paths[file], start, start + 1))
        except (CollectionError, ValueError) as error:
            raise ImageError(f"{self.paths[file]} [{start}]: cannot be read ({error})") from None
        return _read(record, self._source)


class Lines:
    """Rows in JSON lines, as `read_rows` reads them, but not held in memory."""

    positions: Positions

    def __init__(self, paths: Sequence[str], images: Path | None) -> None:
        self.paths, self._files, self._images = paths, _Files(paths), images

    def __len__(self) -> int:
        return len(self.positions)

    def find(self, is_usable: Usable) -> Iterator[Position | LeftOut]:
        """Raises RecipeError with file and line."""
        for number, path in enumerate(self.paths):
            start = 0
            with open(path, "rb") as file:
                for line_number, line in enumerate(file, start=1):
                    if line.strip():
                        row = row_of_line(line, Path(path), line_number)
                        place = f"{path}:{line_number}"
                        if not os.path.exists(self._image(row, path)):
                            yield LeftOut("its image does not exist", f"{place}: {self._image(row, path)}")
                        elif is_usable(row):
                            yield Position(number, start, len(line))
                        else:
                            yield LeftOut("it has no text of the kind", place)
                    start += len(line)

    def read(self, number: int) -> Row:
        position = self.positions[number]
        path = self.paths[position.file]
        try:
            row = parse_row(json.loads(self._files.read(position)))
        except ValueError as error:
            raise ImageError(f"{path}: has changed since it was indexed ({error}); start again") from None
        return Row(self._image(row, path), row.captions, row.questions, row.dialogues)

    def place(self, number: int) -> tuple[str, bool]:
        return self.read(number).image, True

    def _image(self, row: Row, path: str) -> str:
        return os.path.join(os.path.dirname(path) if self._images is None else self._images, row.image)


def _read(record: Record, source: SourceRecipe) -> Row:
    row = _row(record, source, lambda row: True)
    if isinstance(row, LeftOut):
        raise ImageError(f"{row.place}" if record.problem else f"{row.place}: {row.reason}")
    return row


def _are_own_lines(places: Sequence[str]) -> bool:
    """Whether the first line of each file is a row of our own format."""
    for place in places:
        if not place.lower().endswith((".jsonl", ".ndjson")) or not os.path.isfile(place):
            return False
        try:
            with open(place, "rb") as file:
                first = json.loads(next((line for line in file if line.strip()), b"null"))
        except (OSError, ValueError):
            return False
        if not isinstance(first, dict) or not isinstance(first.get("image"), str):
            return False
    return bool(places)
