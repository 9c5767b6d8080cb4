"""The current image files of an index: from folders, from a list, and named in rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from blip2.collection.sources import open_source
from blip2.collection.sources.opening import TABLE_SUFFIXES, TAR_SUFFIXES
from blip2.data.folders import find_in
from blip2.disk import Stamp, stamp_of
from blip2.errors import IndexFileError
from blip2.image import name_of

TABLES = (*TABLE_SUFFIXES, *TAR_SUFFIXES)


class Collection:
    """All image files of folders, single files and rows, by absolute path, each with its stamp.

    ``problems``: a line for each place or entry that cannot be read; its images stay in the index. ``found``: the
    content of the folders. ``rows``: how `open_source` reads rows. Raises IndexFileError if there is nothing at all: a
    drive may not be mounted, and the index would be emptied.
    """

    def __init__(
        self,
        places: Iterable[str | os.PathLike[str]],
        *,
        recursive: bool = True,
        exclude: Iterable[str] = (),
        rows: Mapping[str, Any] | None = None,
    ) -> None:
        named = [os.path.abspath(place) for place in places]
        tables = [place for place in named if os.path.isfile(place) and place.lower().endswith(TABLES)]
        of_rows, problems = _named_in(tables, rows or {})
        folders = [place for place in named if os.path.isdir(place)]
        others = [place for place in named if place not in {*tables}]
        self.found = find_in([*others, *of_rows], recursive=recursive, exclude=exclude)
        self.problems = [*problems, *self.found.problems]
        self.stamps: dict[str, Stamp] = {}
        self._files: set[str] = set()
        self._folders = _within(folder for folder in folders if folder not in self.found.unknown)
        self._unknown = _within(self.found.unknown)
        for path in self.found.images:
            if (stamp := stamp_of(path)) is None:
                self.problems.append(f"{name_of(path)}: no such file or folder; check the path")
            else:
                self.stamps[path] = stamp
                self._files.add(path)
        if not named:
            raise IndexFileError("there are no images to index; name at least one folder")
        if not self.stamps:
            reason = self.problems[0] if self.problems else self.found.skipped_files()
            raise IndexFileError(f"{reason}; the index is unchanged")

    def covers(self, path: str) -> bool:
        """Whether an image with this path would be included if it existed."""
        return path in self._files or (path.startswith(self._folders) and not path.startswith(self._unknown))


def _named_in(tables: list[str], rows: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The files named in rows, without repetitions, and the problems of others. Raises IndexFileError,
    CollectionError."""
    paths: dict[str, None] = {}
    problems: list[str] = []
    for table in tables:
        source = open_source([table], key_column="row", **rows)  # an image may be in several rows
        for record in (record for unit in source.units for record in source.records(unit)):
            if isinstance(record.image, bytes):
                raise IndexFileError(
                    f"{name_of(table)}: contains the images, but an index needs image files to open later; unpack it"
                )
            if record.image is None:
                problems.append(record.problem)
            else:
                paths[os.path.abspath(record.image)] = None
    return [*paths], problems


def _within(folders: Iterable[str]) -> tuple[str, ...]:
    return tuple(os.path.join(folder, "") for folder in folders)
