"""The way of a collection: its records through the model, in units, into the journal and the sinks."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from blip2.collection.columns import plain
from blip2.collection.journal import Journal, Part
from blip2.collection.record import FAILED, SKIPPED, SUCCESS, Record, Result, Source, Unit
from blip2.errors import ImageError
from blip2.image import stored_size

FLUSH_RESULTS = 16
"""After so many, results are on their way to the disk, and what is written a picture at a time is written."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model made of a picture: each text with its score and its number of tokens, the best first."""

    captions: Sequence[str]
    scores: Sequence[float]
    tokens: Sequence[int]


Work = Callable[[Iterator[Record]], Iterator["Outcome | ImageError"]]
"""What becomes of each record, in order. It reads ahead of what it gives, and asks for a record only when there is room
for it; so of a collection of any size a few batches are in memory."""


class Sink(Protocol):
    """A format. All that it writes follows from results, so that after a kill it can be written once more.

    ``wants``: what it has of each picture beside the text, "size" and "sha256". ``notes``: what a person should be told
    of what was written, when the run has ended.
    """

    wants: frozenset[str]
    notes: list[str]

    def check(self, source: Source) -> None:
        """Before the model is loaded: raises CollectionError for what cannot be written, or would be lost."""

    def some(self, results: Sequence[Result]) -> None:
        """Write what is written for each picture, of a few that have captions. Raises OSError."""

    def unit(self, unit: Unit, results: Sequence[Result]) -> None:
        """Write what is written for a unit. Raises OSError."""

    def whole(self, results: Iterable[Result]) -> None:
        """Write what is written of all units, when all are done; ``results`` may be gone through more than once.

        Raises OSError, and CollectionError for what this format cannot hold.
        """


@dataclass
class Summary:
    """Counts of pictures: of this run, and of those before it."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    before: int = 0
    failed_before: int = 0
    is_complete: bool = False
    """Whether all units are done, those of other shards included, so that the output is whole."""


@dataclass(frozen=True)
class Job:
    """``asked``: what `Journal.begin` compares. ``word``: from a record and what the model made of it to the text of
    the outputs. ``skips``: whether a picture that has a text already keeps it. ``retries``: only what failed before is
    done again. ``shard``: which of how many parts of the units."""

    source: Source
    sinks: Sequence[Sink]
    journal: Journal
    word: Callable[[Record, Outcome], str]
    asked: Mapping[str, Any]
    skips: bool = True
    retries: bool = False
    shard: tuple[int, int] = (0, 1)


def run(job: Job, work: Work, on_result: Callable[[Result], None] = lambda result: None) -> Summary:
    """Do what is not done yet. Raises CollectionError, OSError; what was done until then is kept."""
    number, total = job.shard
    summary = Summary()
    todo = [unit for unit in job.source.units if unit.number % total == number and not _is_done(job, unit, summary)]
    known = _known(job) if todo else {}
    with closing(_settled(job, todo, known, work)) as settled:
        for unit, results in _by_unit(settled):
            with closing(job.journal.part(unit)) as part:
                done = list(_written(job, results, part, known, summary, on_result))
            for sink in job.sinks:
                sink.unit(unit, done)
            job.journal.finish(unit, job.source.stamp(unit), done)
    assemble(job, summary)
    return summary


def assemble(job: Job, summary: Summary) -> None:
    """Write the outputs of all units, if all of them are done, whoever did them."""
    units = job.source.units
    summary.is_complete = all(job.journal.stamp_of(unit) == job.source.stamp(unit) for unit in units)
    if not summary.is_complete:
        return
    with job.journal.assembling() as is_ours:
        if is_ours:
            job.journal.forget_beyond(len(units))
            for sink in job.sinks:
                sink.whole(_All(job.journal, units))


@dataclass(frozen=True)
class _All:
    """The results of all units, which are done."""

    journal: Journal
    units: Sequence[Unit]

    def __iter__(self) -> Iterator[Result]:
        return (result for unit in self.units for result in self.journal.results(unit))


def _is_done(job: Job, unit: Unit, summary: Summary) -> bool:
    if job.journal.stamp_of(unit) != job.source.stamp(unit):
        return False
    statuses = Counter(result.status for result in job.journal.results(unit))
    if job.retries and statuses[FAILED]:
        return False
    summary.before += statuses.total()
    summary.failed_before += statuses[FAILED]
    return True


def _known(job: Job) -> dict[tuple[str, str], Result]:
    """What was done of units that are not done, or not as they are now, by key and stamp."""
    return {
        (result.key, result.stamp): result
        for result in job.journal.earlier()
        if not (job.retries and result.status == FAILED)
    }


Settled = tuple[Unit, "Result | None"]
"""A result; None: the unit has no more."""


def _settled(
    job: Job, units: Sequence[Unit], known: Mapping[tuple[str, str], Result], work: Work
) -> Generator[Settled, None, None]:
    """The result of each record, in order. What needs no model passes by those that do, and waits behind them."""
    waiting: deque[tuple[Unit, tuple[Record, Result] | Result | None]] = deque()
    wants = frozenset[str]().union(*(sink.wants for sink in job.sinks))

    def to_model() -> Iterator[Record]:
        for unit in units:
            for record in job.source.records(unit):
                if (result := _without_model(job, record, known, wants)) is not None:
                    waiting.append((unit, result))
                    continue
                waiting.append((unit, (replace(record, picture=None), _begun(record, wants))))
                yield record
            waiting.append((unit, None))

    def ready() -> Iterator[Settled]:
        while waiting and not isinstance(waiting[0][1], tuple):
            yield waiting.popleft()  # type: ignore[misc]

    outcomes = work(to_model())
    for outcome in outcomes:
        yield from ready()
        unit, pair = waiting.popleft()
        assert isinstance(pair, tuple)
        yield unit, _result(job, *pair, outcome)
    yield from ready()


def _without_model(
    job: Job, record: Record, known: Mapping[tuple[str, str], Result], wants: frozenset[str]
) -> Result | None:
    if (before := known.get((record.key, record.stamp))) is not None:
        # A person may have changed what an earlier run wrote.
        return replace(before, text=record.text) if job.skips and record.text else before
    if record.problem:
        return _failed(_begun(record, wants), record.problem)
    if job.skips and record.text:
        return replace(_begun(record, wants), status=SKIPPED, text=record.text)
    return None


def _begun(record: Record, wants: frozenset[str]) -> Result:
    """All that is known of a picture before the model sees it."""
    width, height = (0, 0)
    digest = ""
    if record.picture is not None and "size" in wants:
        width, height = stored_size(record.picture) or (0, 0)
    if record.picture is not None and "sha256" in wants:
        digest = _sha256(record.picture)
    path = record.picture if isinstance(record.picture, str) else ""
    return Result(
        record.key, record.stamp, FAILED, record.name, old=record.text, path=path, width=width, height=height,
        sha256=digest, columns=plain(record.columns),
    )  # fmt: skip


def _sha256(picture: str | bytes) -> str:
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    with suppress(OSError), open(picture, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def _result(job: Job, record: Record, begun: Result, outcome: Outcome | ImageError) -> Result:
    if isinstance(outcome, ImageError):
        return _failed(begun, str(outcome))
    if not (text := job.word(record, outcome)):
        return _failed(begun, f"{record.name}: there is no caption left of {outcome.captions[0]!r}")
    return replace(
        begun, status=SUCCESS, text=text, captions=outcome.captions, scores=outcome.scores, tokens=outcome.tokens
    )


def _failed(begun: Result, message: str) -> Result:
    return replace(begun, status=FAILED, error_message=message)


def _by_unit(settled: Iterator[Settled]) -> Iterator[tuple[Unit, Iterator[Result]]]:
    """The results of each unit, while they come."""

    def until_end(first: Result | None) -> Iterator[Result]:
        result = first
        while result is not None:
            yield result
            _, result = next(settled)

    for unit, result in settled:
        yield unit, until_end(result)


def _written(
    job: Job,
    results: Iterator[Result],
    part: Part,
    known: Mapping[tuple[str, str], Result],
    summary: Summary,
    on_result: Callable[[Result], None],
) -> Iterator[Result]:
    """The results, in the journal and then in what is written a picture at a time."""
    while some := list(islice(results, FLUSH_RESULTS)):
        part.add(some)
        if captioned := [result for result in some if result.status == SUCCESS]:
            for sink in job.sinks:
                sink.some(captioned)
        for result in some:
            if (result.key, result.stamp) in known:
                summary.before += 1
                summary.failed_before += result.status == FAILED
            else:
                summary.done += result.status == SUCCESS
                summary.skipped += result.status == SKIPPED
                summary.failed += result.status == FAILED
                on_result(result)
        yield from some
