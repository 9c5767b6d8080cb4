"""A source as outputs see it: the paths of its images, and existing texts beside or in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from blip2.collection.record import Record, Source, Unit
from blip2.collection.run import Sink
from blip2.disk import stamp_of
from blip2.errors import CollectionError
from blip2.plaintext import NotTextError


class PerImageOutput(Sink, Protocol):
    """An output beside each image, or in it."""

    keeps_time: bool
    """Whether it changes image files and keeps their modification times."""

    def old(self, image: str) -> str:
        """The existing text of an image. Raises CollectionError, NotTextError, OSError."""


class View:
    """The same source. Texts in ``beside`` come before those of the source itself as old texts.

    All of ``beside`` are read, so that a damaged one is a problem of its record. If one of them changes image files
    (``keeps_time``), an image is recognised by the modification time alone. ``takes_text``: whether the source's texts
    are old versions of the new text; a caption is not if answers are written. ``only_per_image``: whether nothing is
    written elsewhere, so that the source's texts are not overwritten: an image without a file beside it is then new
    (`Record.is_new`).
    """

    def __init__(
        self,
        source: Source,
        beside: Sequence[PerImageOutput] = (),
        *,
        takes_text: bool = True,
        only_per_image: bool = False,
    ) -> None:
        self._source = source
        self._takes_text = takes_text
        self._only_per_image = only_per_image
        self._beside = beside
        self._by_time = any(one.keeps_time for one in beside)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before __init__, as in unpickling
            raise AttributeError(name)
        return getattr(self._source, name)

    @property
    def units(self) -> Sequence[Unit]:
        return self._source.units

    @property
    def num_records(self) -> int | None:
        return self._source.num_records

    def stamp(self, unit: Unit) -> str:
        if self._by_time and self._is_files:
            return self._times[unit.number]
        return self._source.stamp(unit)

    def description(self) -> Mapping[str, Any]:
        return self._source.description()

    def records(self, unit: Unit) -> Iterator[Record]:
        return map(self._seen, self._source.records(unit))

    @cached_property
    def images(self) -> Sequence[str] | None:
        """The paths or URLs of all images; None if the source itself holds the images.

        For this, a table of paths is read; a table of images is not.
        """
        match self.description().get("source"):
            case "files":
                return getattr(self._source, "paths", None)
            case "shards":
                return None
        for unit in self.units:
            for record in self._source.records(unit):
                if isinstance(record.image, bytes):
                    return None
                if record.image is not None:
                    return self._all_paths()
        return None

    @cached_property
    def _times(self) -> list[str]:
        """The times of each unit, taken once."""
        found = []
        for unit in self.units:
            digest = hashlib.blake2b(digest_size=16)
            for path in (self.images or ())[unit.start : unit.stop]:
                digest.update(os.fsencode(f"{path}\0{_time(path)}\0"))
            found.append(digest.hexdigest())
        return found

    @property
    def _is_files(self) -> bool:
        return self.description().get("source") == "files"

    def _all_paths(self) -> list[str]:
        return [
            record.image
            for unit in self.units
            for record in self._source.records(unit)
            if isinstance(record.image, str)
        ]

    def _seen(self, record: Record) -> Record:
        if not self._takes_text and record.text:
            record = replace(record, text="")
        if not self._beside or not isinstance(record.image, str) or record.problem:
            return record
        path = record.image
        if self._by_time:
            record = replace(record, stamp=_time(path))
        try:
            old = [*filter(None, [one.old(path) for one in self._beside])]
            return replace(
                record, text=next(iter(old), record.text), is_new=self._only_per_image and not old
            )  # fmt: skip
        except CollectionError as error:
            return replace(record, problem=str(error))
        except (OSError, NotTextError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            problem = f"{record.name}: its existing text cannot be read ({reason}); fix or remove that file"
            return replace(record, problem=problem)


def _time(path: str) -> str:
    found = stamp_of(path)
    return "" if found is None else str(found.mtime_ns // 10**9)  # exiftool keeps whole seconds
