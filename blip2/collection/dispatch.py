"""Units given out to workers, which read, decode, ask the model, and write by themselves, as `run` does.

Here is the one that gives: it holds the journal's lock, hears what was done, gives the units of a worker that died to
another, and writes the outputs of all units at the end. What workers are (processes, Ray's actors), `Workers` hides.
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
"""Of workers at the same unit; then it is left, and the others are done."""


@dataclass(frozen=True, slots=True)
class Ready:
    """It has loaded its models, of which it tells what `Journal.agree` compares."""

    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Some:
    """Results of a unit whose images' outputs are written; those of an earlier worker come once more."""

    unit: int
    results: Sequence[Result]


@dataclass(frozen=True, slots=True)
class Done:
    """A unit is done; ``notes`` of each sink."""

    unit: int
    notes: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class More:
    """It could take another unit now. ``is_idle``: it has none, and waits for one; else it wants to be told at once."""

    is_idle: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """What ends the run."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Died:
    reason: str


Message = Ready | Some | Done | More | Failed | Died


@dataclass(frozen=True, slots=True)
class Given:
    """A unit for a worker. ``again``: another one died of it, or with it, and what it did is in the journal."""

    unit: Unit
    again: bool = False


class Workers(Protocol):
    """A worker says `Ready`, then `More` before each unit; after `Died` it may be started again."""

    number: int

    def start(self, worker: int) -> None: ...

    def give(self, worker: int, given: Given | None) -> None:
        """The answer to `More`; None only if it was not idle."""

    def hear(self) -> tuple[int, Message]:
        """The next word of any of them. Waits for it as long as it takes: a unit may be slow."""

    def close(self) -> None:
        """End them all, at whatever they are."""


def dispatch(job: Job, workers: Workers, units: Sequence[Unit], tell: Tell) -> None:
    """Have workers do these units. Raises what a worker fails of, and CollectionError if they die again and again; what
    was done until then is kept."""
    with closing(workers):
        dispatcher = _Dispatcher(job, workers, units, tell)
        for worker in range(min(workers.number, len(units))):
            workers.start(worker)
        while dispatcher.left:
            dispatcher.hear(*workers.hear())
    if dispatcher.lost:
        unit, reason = dispatcher.lost[0]
        of = f"; so did {len(dispatcher.lost) - 1} more" if len(dispatcher.lost) > 1 else ""
        raise CollectionError(
            f"{_told(unit)}: {MOST_DEATHS} workers died at it ({reason}){of}; all else is done, and the same command "
            "tries it again"
        )


class _Dispatcher:
    """``left``: the numbers of units that are neither done nor ``lost``."""

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
        """Of each worker, since it had a unit."""
        self._told: Counter[int] = Counter()
        """Of each unit, how many results were told."""
        self._come: Counter[int] = Counter()
        """And how many came from the worker that has it now."""

    def hear(self, worker: int, message: Message) -> None:
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
                if new := results[max(self._told[unit] - before, 0) :]:
                    self._told[unit] += len(new)
                    self._tell(new)
            case Done(unit, notes):
                self.left.discard(unit)
                self._given[worker] = [given for given in self._given[worker] if given.number != unit]
                for sink, some in zip(self._job.sinks, notes, strict=True):
                    sink.notes.extend(some)
            case Failed(error):
                raise error
            case Died(reason):
                self._bury(worker, reason)
        while self._idle and self._waiting:
            first = self._idle.pop(0)
            self._workers.give(first, self._next(first))

    def _next(self, worker: int) -> Given | None:
        """What has killed a worker is given alone, so that another unit does not stand for it."""
        has = self._given.setdefault(worker, [])
        if not self._waiting or (has and any(self._deaths[unit.number] for unit in (*has, self._waiting[0]))):
            return None
        unit = self._waiting.popleft()
        has.append(unit)
        self._deaths_without[worker] = 0
        return Given(unit, again=self._deaths[unit.number] > 0)

    def _bury(self, worker: int, reason: str) -> None:
        units = self._given.pop(worker, [])
        if worker in self._idle:
            self._idle.remove(worker)
        if not units:
            self._deaths_without[worker] += 1
            if self._deaths_without[worker] >= MOST_DEATHS:
                raise CollectionError(f"a worker died {MOST_DEATHS} times before it had anything to do ({reason})")
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


def _told(unit: Unit) -> str:
    part = f", images {unit.start + 1:,} to {unit.stop:,}" if unit.stop else ""
    return f"{unit.place}{part}" if unit.place else f"unit {unit.number + 1}{part}"


