"""What a model is given of a source's records, and what passes it by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from blip2.collection.copies import Copies, Copy, First
from blip2.collection.journal import Journal
from blip2.collection.record import SKIPPED, Record, Result, Source, Unit

Settled = tuple[Unit, "Result | None"]
"""A result; None: the unit has no more."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A record that the model has, without its image. ``result``: what is known of it. It is given only because it
    belongs to a batch if ``is_known``, or if ``is_left`` to the next run. ``first``: is told its result."""

    record: Record
    result: Result
    first: First
    is_known: bool = False
    is_left: bool = False


@dataclass(frozen=True, slots=True)
class _Looked:
    """A record, and what was found of it; ``belongs``: to a batch."""

    record: Record
    found: Result | Copy | None
    belongs: bool
    first: First


class Feed(Iterator[Record]):
    """The records that need a model, in batches that are the same however often a run was stopped: they begin anew with
    each unit, and of a batch that was left unfinished all records are given once more. So the numbers that a model
    makes of an image, which depend in their last digits on its company, are the same.

    ``look``: the result of a record that needs no model; ``begin``: what is known of one that does. ``repeat``: the
    result of a copy, of which the model is given the first alone; None if it is given all. ``limit``: ends after so
    many records. ``again``: whether batches are those of the run before.
    """

    def __init__(
        self,
        source: Source,
        units: Iterable[Unit],
        journal: Journal,
        look: Callable[[Record], Result | None],
        begin: Callable[[Record], Result],
        repeat: Callable[[Copy], Result] | None,
        limit: int | None,
        *,
        again: bool,
    ) -> None:
        self._source, self._journal, self._again = source, journal, again
        self._look, self._begin, self._repeat = look, begin, repeat
        self._room = limit
        self._size = 1
        self._waiting: deque[tuple[Unit, Pending | Copy | Result | None]] = deque()
        self._batches = self._all(units)
        self._first: list[Record] = []
        self.cut: set[int] = set()
        """The number of the unit at which the limit was reached."""

    def __next__(self) -> Record:
        if self._first:  # of `begins`, whose batch may be larger
            return self._first.pop(0)
        if batch := self.batch(1):
            return batch[0]
        raise StopIteration

    def batch(self, size: int) -> list[Record]:
        """The next ones, at most so many, always the same number; none at the end."""
        self._size = size
        first, self._first = self._first, []
        return first or next(self._batches, [])

    def begins(self, size: int) -> bool:
        """Whether there is any batch; asked before the first, so that no model is loaded for none."""
        self._first = self.batch(size)
        return bool(self._first)

    # ---- by who has the results ----

    def passing_by(self) -> Iterator[Settled]:
        """What is settled and waits for no model."""
        while self._waiting and not isinstance(self._waiting[0][1], Pending):
            unit, found = self._waiting.popleft()
            if isinstance(found, Copy):
                assert self._repeat is not None
                found = self._repeat(found)
            yield unit, found  # type: ignore[misc]

    def next_pending(self) -> tuple[Unit, Pending]:
        """What the model's next outcome is of."""
        unit, pending = self._waiting.popleft()
        assert isinstance(pending, Pending)
        return unit, pending

    # ---- batches ----

    def _all(self, units: Iterable[Unit]) -> Iterator[list[Record]]:
        for unit in units:
            begun = self._journal.begun(unit) if self._again else set()
            span: list[_Looked] = []
            copies = Copies()
            number = 0
            for record in self._source.records(unit):
                looked = self._looked(record, begun, copies)
                span.append(looked)
                number += looked.belongs
                if number == self._size:
                    if batch := self._batch(unit, span):
                        yield batch
                    if self.cut:
                        return
                    span, number = [], 0
            if batch := self._batch(unit, span):
                yield batch
            if self.cut:
                return
            self._waiting.append((unit, None))

    def _looked(self, record: Record, begun: set[tuple[str, str]], copies: Copies) -> _Looked:
        found: Result | Copy | None = self._look(record)
        was_model = isinstance(found, Result) and found.status != SKIPPED and not record.problem
        new = first = First(found if isinstance(found, Result) else None)
        if self._repeat is not None and (found is None or was_model):
            first = copies.first(record, new)
        if first is not new:
            found = found or Copy(replace(record, picture=None), self._begin(record), first)
            return _Looked(record, found, False, first)
        return _Looked(record, found, found is None or (was_model and (record.key, record.stamp) in begun), first)

    def _batch(self, unit: Unit, span: list[_Looked]) -> list[Record]:
        """Empty where all is known, or nothing is done any more."""
        if all(looked.found is not None for looked in span):
            self._waiting.extend((unit, looked.found) for looked in span)
            return []
        if self._room == 0:
            self.cut.add(unit.number)
            return []
        for looked in span:
            record, found = looked.record, looked.found
            if found is None and self._room == 0:
                self.cut.add(unit.number)
            if looked.belongs:
                assert not isinstance(found, Copy)
                result = found or self._begin(record)
                without = replace(record, picture=None)
                self._waiting.append((unit, Pending(without, result, looked.first, found is not None, bool(self.cut))))
            elif not self.cut:
                self._waiting.append((unit, found))
            if found is None and self._room:
                self._room -= 1
        return [looked.record for looked in span if looked.belongs]
