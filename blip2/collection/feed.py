"""What a model is given of a source's records, and what passes it by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from blip2.collection.journal import Journal
from blip2.collection.record import SKIPPED, Record, Result, Source, Unit

Settled = tuple[Unit, "Result | None"]
"""A result; None: the unit has no more."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A record that the model has, without its picture. ``result``: what is known of it. It is given only because it
    belongs to a batch if ``is_known``, or if ``is_left`` to the next run."""

    record: Record
    result: Result
    is_known: bool = False
    is_left: bool = False


class Feed(Iterator[Record]):
    """The records that need a model, in batches that are the same however often a run was stopped: they begin anew with
    each unit, and of a batch that was left unfinished all records are given once more. So the numbers that a model
    makes of a picture, which depend in their last digits on its company, are the same.

    ``look``: the result of a record that needs no model; ``begin``: what is known of one that does. ``limit``: ends
    after so many records. ``again``: whether batches are those of the run before.
    """

    def __init__(
        self,
        source: Source,
        units: Iterable[Unit],
        journal: Journal,
        look: Callable[[Record], Result | None],
        begin: Callable[[Record], Result],
        limit: int | None,
        *,
        again: bool,
    ) -> None:
        self._source, self._journal, self._again = source, journal, again
        self._look, self._begin = look, begin
        self._room = limit
        self._size = 1
        self._waiting: deque[tuple[Unit, Pending | Result | None]] = deque()
        self._batches = self._all(units)
        self._first: list[Record] = []
        self._is_cut = False

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
            yield self._waiting.popleft()  # type: ignore[misc]

    def next_pending(self) -> tuple[Unit, Pending]:
        """What the model's next outcome is of."""
        unit, pending = self._waiting.popleft()
        assert isinstance(pending, Pending)
        return unit, pending

    # ---- batches ----

    def _all(self, units: Iterable[Unit]) -> Iterator[list[Record]]:
        for unit in units:
            begun = self._journal.begun(unit) if self._again else set()
            span: list[tuple[Record, Result | None, bool]] = []  # with whether it belongs to a batch
            number = 0
            for record in self._source.records(unit):
                found = self._look(record)
                was_model = found is not None and found.status != SKIPPED and not record.problem
                belongs = found is None or (was_model and (record.key, record.stamp) in begun)
                span.append((record, found, belongs))
                number += belongs
                if number == self._size:
                    if batch := self._batch(unit, span):
                        yield batch
                    if self._is_cut:
                        return
                    span, number = [], 0
            if batch := self._batch(unit, span):
                yield batch
            if self._is_cut:
                return
            self._waiting.append((unit, None))

    def _batch(self, unit: Unit, span: list[tuple[Record, Result | None, bool]]) -> list[Record]:
        """Empty where all is known, or nothing is done any more."""
        if all(found is not None for _, found, _ in span):
            self._waiting.extend((unit, found) for _, found, _ in span)
            return []
        if self._room == 0:
            self._is_cut = True
            return []
        for record, found, belongs in span:
            self._is_cut = self._is_cut or (found is None and self._room == 0)
            if belongs:
                result = found or self._begin(record)
                self._waiting.append(
                    (unit, Pending(replace(record, picture=None), result, found is not None, self._is_cut))
                )
            elif not self._is_cut:
                self._waiting.append((unit, found))
            if found is None and self._room:
                self._room -= 1
        return [record for record, _, belongs in span if belongs]
