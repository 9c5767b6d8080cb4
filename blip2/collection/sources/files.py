"""Folders and lists of files. A unit is a range of files; its stamp covers all of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2.collection.record import Record, Unit, runs_of
from blip2.collection.sources.tables import read_json
from blip2.data.folders import Found
from blip2.disk import stamp_of
from blip2.errors import CollectionError
from blip2.image import name_of
from blip2.plaintext import NotTextError, read_text

UNIT_FILES = 256


@dataclass(frozen=True, slots=True)
class ImageMetadata:
    """What is known of an image from another place than a file beside it."""

    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


NO_METADATA = ImageMetadata()


class Files:
    """Images by their paths, in order. ``root``: keys are relative to it. ``text_suffix``: suffix of the files beside
    images that hold their existing texts ("" for none); it replaces the image's suffix or, with ``keeps_suffix``,
    follows it. ``has_json``: whether JSON files beside images hold their columns. ``metadata``: what else is known, by
    path.

    ``problems``: a line for each file or folder that cannot be read. ``found``: everything in the folders.
    """

    problems: Sequence[str] = ()
    found = Found()

    def __init__(
        self,
        paths: Sequence[str],
        *,
        root: str = "",
        text_suffix: str = "",
        keeps_suffix: bool = False,
        has_json: bool = False,
        metadata: Mapping[str, ImageMetadata] | None = None,
    ) -> None:
        self.paths = paths
        self.root = root
        self.text_suffix = text_suffix
        self._keeps_suffix = keeps_suffix
        self._has_json = has_json
        self._metadata = metadata or {}

    @property
    def num_records(self) -> int:
        return len(self.paths)

    @cached_property
    def units(self) -> list[Unit]:
        return runs_of(len(self.paths), UNIT_FILES, self.root)

    def stamp(self, unit: Unit) -> str:
        return self._stamps[unit.number]

    def records(self, unit: Unit) -> Iterator[Record]:
        for path in self.paths[unit.start : unit.stop]:
            known = self._metadata.get(path, NO_METADATA)
            text, problem = self._text_beside(path)
            columns, wrong_columns = self._columns(path)
            yield Record(
                self.key(path), path, path, _stamp(path), text or known.text, {**columns, **known.columns},
                problem or wrong_columns,
            )  # fmt: skip

    def skipped_files(self, apart: Collection[str] = ()) -> str:
        """The files that are not images and not read, as `Found` lists them."""
        return self.found.skipped_files({*apart, self.text_suffix.lower()})

    def description(self) -> Mapping[str, Any]:
        return {"source": "files", "root": os.path.abspath(self.root) if self.root else ""}

    def key(self, path: str) -> str:
        return key_of(path, self.root)

    @cached_property
    def _stamps(self) -> list[str]:
        """Each unit's stamp, from the names, sizes and times of its files. Taken once, so that an image that changes
        during a run is processed again by the next."""
        found = []
        for unit in self.units:
            digest = hashlib.blake2b(digest_size=16)
            for path in self.paths[unit.start : unit.stop]:
                digest.update(os.fsencode(f"{self.key(path)}\0{_stamp(path)}\0"))
            found.append(digest.hexdigest())
        return found

    def _text_beside(self, path: str) -> tuple[str, str]:
        """The text in a file beside an image, and the problem if it cannot be read."""
        if not self.text_suffix or path == "-" or _is_address(path):
            return "", ""
        text_path = Path(path + self.text_suffix) if self._keeps_suffix else Path(path).with_suffix(self.text_suffix)
        try:
            return " ".join(read_text(text_path).split()), ""
        except FileNotFoundError:
            return "", ""
        except (OSError, NotTextError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return "", f"{name_of(text_path)}: cannot be read ({reason}); fix or remove it"

    def _columns(self, path: str) -> tuple[Mapping[str, Any], str]:
        text_path = Path(path).with_suffix(".json")
        if not self._has_json or not text_path.exists():
            return {}, ""
        try:
            value = read_json(str(text_path))
        except CollectionError as error:
            return {}, str(error)
        return (value, "") if isinstance(value, dict) else ({}, f"{name_of(text_path)}: is no object; fix or remove it")


def key_of(path: str, root: str) -> str:
    """The path relative to ``root``, with / between folders on every system; without a root, the whole path."""
    if not root or _is_address(path):
        return path
    within = os.path.join(root, "")
    is_plain = path.startswith(within) and f"{os.sep}." not in path and 2 * os.sep not in path
    return (path.removeprefix(within) if is_plain else os.path.relpath(path, root)).replace(os.sep, "/")


def _is_address(path: str) -> bool:
    return bool(re.match(r"https?://|data:", path, re.IGNORECASE))


def _stamp(path: str) -> str:
    found = stamp_of(path)
    return "" if found is None else f"{found.size}-{found.mtime_ns}"
