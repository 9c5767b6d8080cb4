"""A source as outputs see it: where its pictures' files are, and what is said beside them, or in them, already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from blip2.collection.record import Record, Source, Unit
from blip2.errors import CollectionError
from blip2.plaintext import NotTextError


class View:
    """The same source; ``old``: from a picture's path to what was said of it, before what the source says itself.

    ``old`` may raise CollectionError, NotTextError and OSError, which are problems of that record.
    """

    def __init__(self, source: Source, old: Callable[[str], str] | None = None) -> None:
        self._source = source
        self._old = old

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    @property
    def units(self) -> Sequence[Unit]:
        return self._source.units

    @property
    def num_records(self) -> int | None:
        return self._source.num_records

    def stamp(self, unit: Unit) -> str:
        return self._source.stamp(unit)

    def told(self) -> Mapping[str, Any]:
        return self._source.told()

    def records(self, unit: Unit) -> Iterator[Record]:
        return map(self._with_old, self._source.records(unit))

    @cached_property
    def pictures(self) -> Sequence[str] | None:
        """The files of all pictures, and their addresses; None where the source itself holds them.

        A table of paths is read for that, a table of pictures is not.
        """
        match self.told().get("source"):
            case "files":
                return getattr(self._source, "paths", None)
            case "shards":
                return None
        for unit in self.units:
            for record in self._source.records(unit):
                if isinstance(record.picture, bytes):
                    return None
                if record.picture is not None:
                    return self._all_paths()
        return None

    def _all_paths(self) -> list[str]:
        return [
            record.picture
            for unit in self.units
            for record in self._source.records(unit)
            if isinstance(record.picture, str)
        ]

    def _with_old(self, record: Record) -> Record:
        if self._old is None or not isinstance(record.picture, str) or record.problem:
            return record
        try:
            return replace(record, text=self._old(record.picture) or record.text)
        except CollectionError as error:
            return replace(record, problem=str(error))
        except (OSError, NotTextError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            problem = f"{record.name}: what is said of it already cannot be read ({reason}); mend or remove that file"
            return replace(record, problem=problem)
