"""The metadata of an ImageFolder of `datasets`: metadata.jsonl, .csv or .parquet, in the folder or its subfolders.

A row names its image in ``file_name``, relative to the folder of the metadata file. Here a folder means all its images,
also those without a row.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from blip2.collection.sources.fields import caption_column_of, text_of
from blip2.collection.sources.files import ImageMetadata
from blip2.collection.sources.parquet import Parquet
from blip2.collection.sources.tables import Cells, JsonLines, Row, Table
from blip2.errors import CollectionError, option
from blip2.image import name_of

FILE = "file_name"
NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class FolderMetadata:
    """The metadata of the images ``paths``: ``by_path``. ``problems``: a line for each row that cannot be used, or
    whose image is missing. Raises CollectionError for metadata files of several formats (which `datasets` rejects), for
    unreadable ones, and for two rows of one image."""

    def __init__(self, metadata: Sequence[str], paths: Sequence[str], caption_column: str | None = None) -> None:
        self.by_path: dict[str, ImageMetadata] = {}
        self.problems: list[str] = []
        self._there = {os.path.normpath(path): path for path in paths}
        self._composed = {_composed(path): path for path in paths if not path.isascii()}
        tables = [table for path in metadata if FILE in (table := _table(path)).columns]  # others may have this name
        by_suffix = {os.path.splitext(table.path)[1]: table.path for table in tables}
        if len(by_suffix) > 1:
            first, second = sorted(by_suffix.values())[:2]
            raise CollectionError(
                f"{first} and {second} both describe the images; keep one format, or leave one out with "
                f"{option('exclude')}"
            )
        origins: dict[str, str] = {}
        for table in tables:
            column = caption_column_of([table], caption_column, FILE)
            for row in table.rows():
                self._take(table, row, column, origins)

    def _take(self, table: Table, row: Row, column: str, origins: dict[str, str]) -> None:
        name = row.values.get(FILE)
        if reason := row.problem or _wrong(name):
            self.problems.append(f"{row.name}: {reason}")
            return
        wanted = os.path.join(os.path.dirname(table.path), str(name))
        path = self._path(wanted) or self._path(wanted.replace("\\", "/"))  # a path written on Windows
        if path is None:
            if not os.path.lexists(wanted):  # otherwise it was excluded
                self.problems.append(f"{row.name}: {name_of(wanted)} is missing; restore it, or remove the row")
            return
        if path in origins:
            raise CollectionError(f"{origins[path]} and {row.name} both describe {path}; keep one of them")
        origins[path] = row.name
        text, problem = text_of(row.values.get(column)) if column else ("", "")
        if problem:
            self.problems.append(f"{row.name}: {problem}")
        self.by_path[path] = ImageMetadata(text, {key: value for key, value in row.values.items() if key != FILE})

    def _path(self, wanted: str) -> str | None:
        """The path as the folder spells it: macOS stores accents as separate characters."""
        return self._there.get(os.path.normpath(wanted)) or self._composed.get(_composed(wanted))


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path))


def metadata_in(folders: Sequence[str], recursive: bool, exclude: Sequence[str]) -> list[str]:
    """The metadata files of folders."""
    return [path for path in files_in(folders, recursive, exclude) if os.path.basename(path) in NAMES]


def files_in(folders: Sequence[str], recursive: bool, exclude: Sequence[str]) -> Iterator[str]:
    """All files in folders, in order, without hidden and excluded ones, as for images."""
    for folder in folders:

        def is_wanted(path: str, top: str = folder) -> bool:
            name, within = os.path.basename(path), os.path.relpath(path, top) if exclude else ""
            is_excluded = any(fnmatchcase(known, pattern) for pattern in exclude for known in (name, within))
            return not name.startswith(".") and not is_excluded

        for place, inner, names in os.walk(folder):
            inner[:] = sorted(name for name in inner if recursive and is_wanted(os.path.join(place, name)))
            yield from filter(is_wanted, (os.path.join(place, name) for name in sorted(names)))


def _table(path: str) -> Table:
    try:
        if path.endswith(".csv"):
            return Cells(path, ",")
        return Parquet(path) if path.endswith(".parquet") else JsonLines(path)
    except CollectionError as error:
        raise CollectionError(f"{error}; or leave it out with {option('exclude')}") from None


def _wrong(name: object) -> str:
    """Why a name cannot be used; `datasets` refuses the same names."""
    if not isinstance(name, str) or not name.strip():
        return f"there is no {FILE!r}"
    if os.path.isabs(name) or "://" in name or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        return f"{FILE!r} is {name!r}, but has to be a path within the folder"
    return ""
