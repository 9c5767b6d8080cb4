"""Distribute units to workers, which read, decode, run the model and write by themselves, as `run` does.

This is the main process. It holds the journal's lock, receives the results, gives the units of a dead worker to another
one, and writes the outputs of all units at the end. `Workers` hides what a worker is (a process, a Ray actor).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from blip2.collection.record import Result, Unit
from blip2.collection.run import Job, Tell
from blip2.errors import CollectionError

MOST_DEATHS = 3
"""Deaths of workers at the same unit, after which the unit is skipped and the others are processed."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded its models. Carries what `Journal.agree` compares."""

    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Some:
    """Results of a unit whose images' outputs are written. Those of a dead worker are sent again."""

    unit: int
    results: Sequence[Result]


@dataclass(frozen=True, slots=True)
class Done:
    """A unit is finished. ``notes``: those of each sink."""

    unit: int
    notes: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class More:
    """The worker can take another unit. ``is_idle``: it has none and waits; else it wants an immediate answer."""

    is_idle: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that ends the run."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Died:
    reason: str


Message = Ready | Some | Done | More | Failed | Died


@dataclass(frozen=True, slots=True)
class Given:
    """A unit for a worker. ``again``: an earlier worker died during it; its results are in the journal."""

    unit: Unit
    again: bool = False


class Workers(Protocol):
    """A worker sends `Ready`, then `More` before each unit. After `Died` it may be started again."""

    number: int

    def start(self, worker: int) -> None: ...

    def give(self, worker: int, given: Given | None) -> None:
        """The answer to `More`. None only if the worker is not idle."""

    def receive(self) -> tuple[int, Message]:
        """The next message of any worker. Blocks without a limit, since a unit may be slow."""

    def close(self) -> None:
        """End all workers, whatever they are doing."""


def dispatch(job: Job, workers: Workers, units: Sequence[Unit], tell: Tell) -> None:
    """Have workers process these units. Raises a worker's error, and CollectionError if workers die repeatedly.
    Finished results are kept."""
    with closing(workers):
        dispatcher = _Dispatcher(job, workers, units, tell)
        for worker in range(min(workers.number, len(units))):
            workers.start(worker)
        while dispatcher.left:
            dispatcher.receive(*workers.receive())
    if dispatcher.lost:
        unit, reason = dispatcher.lost[0]
        of = f"; so did {len(dispatcher.lost) - 1} more" if len(dispatcher.lost) > 1 else ""
        raise CollectionError(
            f"{_label(unit)}: {MOST_DEATHS} workers died during it ({reason}){of}; the rest is done; the same command "
            "tries it again"
        )


class _Dispatcher:
    """``left``: the numbers of units that are neither finished nor ``lost``."""

    def __init__(self, job: Job, workers: Workers, units: Sequence[Unit], tell: Tell) -> None:
        self._job = job
        self._workers = workers
        self._tell = tell
        self._waiting = deque(units)
        self.left = {unit.number for unit in units}
        self.lost: list[tuple[Unit, str]] = []
        self._given: dict[int, list[Unit]] = {}
        self._idle: list[int] = []
        self._deaths: Counter[int] = Counter()
        self._deaths_without: Counter[int] = Counter()
        """Deaths per worker since it last got a unit."""
        self._num_reported: Counter[int] = Counter()
        """Results received per unit."""
        self._come: Counter[int] = Counter()
        """Results per unit from the worker that has it now."""

    def receive(self, worker: int, message: Message) -> None:
        match message:
            case Ready(facts):
                for name, value in facts.items():
                    self._job.journal.agree(name, value)
            case More(is_idle=True):
                self._idle.append(worker)
            case More():
                self._workers.give(worker, self._next(worker))
            case Some(unit, results):
                before, self._come[unit] = self._come[unit], self._come[unit] + len(results)
                if new := results[max(self._num_reported[unit] - before, 0) :]:
                    self._num_reported[unit] += len(new)
                    self._tell(new)
            case Done(unit, notes):
                self.left.discard(unit)
                self._given[worker] = [given for given in self._given[worker] if given.number != unit]
                for sink, some in zip(self._job.sinks, notes, strict=True):
                    sink.notes.extend(some)
            case Failed(error):
                raise error
            case Died(reason):
                self._worker_died(worker, reason)
        while self._idle and self._waiting:
            first = self._idle.pop(0)
            self._workers.give(first, self._next(first))

    def _next(self, worker: int) -> Given | None:
        """A unit that killed a worker is given out alone, so that no other unit is blamed for it."""
        has = self._given.setdefault(worker, [])
        if not self._waiting or (has and any(self._deaths[unit.number] for unit in (*has, self._waiting[0]))):
            return None
        unit = self._waiting.popleft()
        has.append(unit)
        self._deaths_without[worker] = 0
        return Given(unit, again=self._deaths[unit.number] > 0)

    def _worker_died(self, worker: int, reason: str) -> None:
        units = self._given.pop(worker, [])
        if worker in self._idle:
            self._idle.remove(worker)
        if not units:
            self._deaths_without[worker] += 1
            if self._deaths_without[worker] >= MOST_DEATHS:
                raise CollectionError(f"a worker died {MOST_DEATHS} times while it started ({reason})")
        for unit in reversed(units):
            self._come[unit.number] = 0
            self._deaths[unit.number] += 1
            if self._deaths[unit.number] < MOST_DEATHS:
                self._waiting.appendleft(unit)
            else:
                self.left.discard(unit.number)
                self.lost.append((unit, reason))
        if self.left:
            self._workers.start(worker)


def _label(unit: Unit) -> str:
    part = f", images {unit.start + 1:,} to {unit.stop:,}" if unit.stop else ""
    return f"{unit.place}{part}" if unit.place else f"unit {unit.number + 1}{part}"


