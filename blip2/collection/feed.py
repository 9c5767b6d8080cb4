"""The records of a source that need the model, in reproducible batches, and those that do not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from blip2.collection.copies import Copies, Copy, First
from blip2.collection.journal import Journal
from blip2.collection.record import SKIPPED, Record, Result, Source, Unit

Settled = tuple[Unit, "Result | None"]
"""A result. None: the unit is finished."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A record in the model, without its image. ``result``: what is known of it. Records with ``is_known`` (the result
    is complete) or ``is_left`` (left to the next run) only complete a batch. ``first``: receives the result."""

    record: Record
    result: Result
    first: First
    is_known: bool = False
    is_left: bool = False


@dataclass(frozen=True, slots=True)
class _Examined:
    """A record and what was found out about it. ``belongs``: it is part of a batch."""

    record: Record
    found: Result | Copy | None
    belongs: bool
    first: First


class Feed(Iterator[Record]):
    """The records that need a model, in batches that do not depend on interruptions. Batches begin anew with each unit,
    and an unfinished batch is repeated completely. The last digits of a model's numbers depend on the other images in
    the batch, so this keeps results identical.

    ``look``: the result of a record that needs no model. ``begin``: the initial result of one that does. ``repeat``:
    the result of a copy (then the model only gets the first of equal images); None if it gets all. ``limit``: the
    number of records to end after. ``again``: whether batches are those of the run before.
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
        self._num_left = limit
        self._size = 1
        self._waiting: deque[tuple[Unit, Pending | Copy | Result | None]] = deque()
        self._batches = self._all(units)
        self._first: list[Record] = []
        self.cut: set[int] = set()
        """The number of the unit in which the limit was reached."""

    def __next__(self) -> Record:
        if self._first:  # left by `begins`, whose batch may be larger
            return self._first.pop(0)
        if batch := self.batch(1):
            return batch[0]
        raise StopIteration

    def batch(self, size: int) -> list[Record]:
        """The next records, at most ``size``, always the same number; none at the end."""
        self._size = size
        first, self._first = self._first, []
        return first or next(self._batches, [])

    def begins(self, size: int) -> bool:
        """Whether there is any batch. Asked first, so that no model is loaded for nothing."""
        self._first = self.batch(size)
        return bool(self._first)

    # ---- for the consumer of results ----

    def ready_results(self) -> Iterator[Settled]:
        """Results that are ready and wait for no model."""
        while self._waiting and not isinstance(self._waiting[0][1], Pending):
            unit, found = self._waiting.popleft()
            if isinstance(found, Copy):
                assert self._repeat is not None
                found = self._repeat(found)
            yield unit, found  # type: ignore[misc]

    def next_pending(self) -> tuple[Unit, Pending]:
        """The unit and the record of the model's next outcome."""
        unit, pending = self._waiting.popleft()
        assert isinstance(pending, Pending)
        return unit, pending

    # ---- batches ----

    def _all(self, units: Iterable[Unit]) -> Iterator[list[Record]]:
        for unit in units:
            begun = self._journal.begun(unit) if self._again else set()
            span: list[_Examined] = []
            copies = Copies()
            number = 0
            for record in self._source.records(unit):
                examined = self._looked(record, begun, copies)
                span.append(examined)
                number += examined.belongs
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

    def _looked(self, record: Record, begun: set[tuple[str, str]], copies: Copies) -> _Examined:
        found: Result | Copy | None = self._look(record)
        was_model = isinstance(found, Result) and found.status != SKIPPED and not record.problem
        new = first = First(found if isinstance(found, Result) else None)
        if self._repeat is not None and (found is None or was_model):
            first = copies.first(record, new)
        if first is not new:
            found = found or Copy(replace(record, image=None), self._begin(record), first)
            return _Examined(record, found, False, first)
        return _Examined(record, found, found is None or (was_model and (record.key, record.stamp) in begun), first)

    def _batch(self, unit: Unit, span: list[_Examined]) -> list[Record]:
        """The batch; empty if all results are known, or the limit is reached."""
        if all(examined.found is not None for examined in span):
            self._waiting.extend((unit, examined.found) for examined in span)
            return []
        if self._num_left == 0:
            self.cut.add(unit.number)
            return []
        for examined in span:
            record, found = examined.record, examined.found
            if found is None and self._num_left == 0:
                self.cut.add(unit.number)
            if examined.belongs:
                assert not isinstance(found, Copy)
                result = found or self._begin(record)
                without = replace(record, image=None)
                pending = Pending(without, result, examined.first, found is not None, bool(self.cut))
                self._waiting.append((unit, pending))
            elif not self.cut:
                self._waiting.append((unit, found))
            if found is None and self._num_left:
                self._num_left -= 1
        return [examined.record for examined in span if examined.belongs]
