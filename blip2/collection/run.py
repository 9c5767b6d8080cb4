"""The run over a collection: records through the model, in units, into the journal and the sinks."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

from blip2.collection.background import in_background
from blip2.collection.copies import Copy
from blip2.collection.feed import Feed, Settled
from blip2.collection.journal import Journal
from blip2.collection.part import Part
from blip2.collection.record import FAILED, SUCCESS, Record, Result, Source, Unit
from blip2.collection.results import begun, failed, result_of, why_failed, without_model
from blip2.collection.summary import OnResults, Summary
from blip2.errors import ImageError
from blip2.image import name_of

FLUSH_RESULTS, FLUSH_S = 16, 1.0
"""Number of results and seconds after which per-image outputs are written. Syncing hundreds of small files together
takes a disk as long as a few."""
MOST_WAITING = 256
"""Results waiting to be written. If there are more, the model waits."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The model's output for an image: texts with score and number of tokens, best first."""

    captions: Sequence[str]
    scores: Sequence[float]
    tokens: Sequence[int]


Work = Callable[[Iterator[Record]], Iterator["Outcome | ImageError"]]
"""Maps records to outcomes, in order. It reads ahead, and asks for a record only if there is room for it; so memory
holds a few batches, whatever the size of the collection."""


class Sink(Protocol):
    """An output format. Its content follows from the results alone, so that it can be written again after a kill.

    ``wants``: what it needs of each image beside the text, "size" and "sha256". ``notes``: messages for the user about
    the output, shown when the run ends.
    """

    wants: frozenset[str]
    notes: list[str]

    def check(self, source: Source) -> None:
        """Called before the model is loaded. Raises CollectionError for what cannot be written, or would be lost."""

    def some(self, results: Sequence[Result]) -> None:
        """Write per-image outputs for a few results with captions. Raises OSError."""

    def unit(self, unit: Unit, results: Sequence[Result]) -> None:
        """Write the output of a unit. Raises OSError."""

    def whole(self, results: Iterable[Result]) -> None:
        """Write the output of all units, when all are finished. ``results`` may be iterated more than once.

        Raises OSError, and CollectionError if this format cannot hold a result.
        """


@dataclass(frozen=True)
class Job:
    """``asked``: what `Journal.begin` compares. ``word``: makes the text of the outputs from a record and the model's
    outcome. ``skips``: whether images that have a text keep it. ``retries``: process failed images again. ``shard``:
    part and number of parts, from 0. ``limit``: number of images processed by the model to end after; the next run
    continues. ``output``: the file written from all units, if any. ``dedupes``: of equal images in a unit, the model
    only processes the first."""

    source: Source
    sinks: Sequence[Sink]
    journal: Journal
    word: Callable[[Record, Outcome], str]
    asked: Mapping[str, Any]
    skips: bool = True
    retries: bool = False
    shard: tuple[int, int] = (0, 1)
    limit: int | None = None
    output: str = ""
    dedupes: bool = False

    @property
    def units(self) -> list[Unit]:
        """The units of this shard."""
        number, total = self.shard
        return [unit for unit in self.source.units if unit.number % total == number]


Known = Mapping[tuple[str, str], Result]
"""Earlier results, by key and stamp."""
Tell = Callable[[Sequence[Result]], None]
OnUnitResults = Callable[[Unit, "Sequence[Result] | None"], None]
"""Receives the results of a unit, a few at a time, once per-image outputs are written. None: the unit is finished."""


def run(job: Job, work: Work, on_results: OnResults = lambda summary, results: None) -> Summary:
    """Process what is not finished. Raises CollectionError, OSError; finished results are kept."""

    def doing(units: Sequence[Unit], known: Known, tell: Tell) -> bool:
        return do(job, units, known, work, lambda unit, results: None if results is None else tell(results))

    return run_by(job, doing, on_results)


def run_by(
    job: Job,
    doing: Callable[[Sequence[Unit], Known, Tell], bool],
    on_results: OnResults = lambda summary, results: None,
) -> Summary:
    """As `run`, with another function for processing units. It gets the units and their known results. It reports each
    result once, and whether a limit ended it."""
    summary = Summary(total=_total(job))
    started = time.monotonic()
    todo = [unit for unit in job.units if not _is_done(job, unit, summary)]
    known = _known(job) if todo else {}

    def tell(results: Sequence[Result]) -> None:
        new = [result for result in results if (result.key, result.stamp) not in known]
        for result in results:
            summary.count(result, is_new=(result.key, result.stamp) not in known)
        summary.clock(time.monotonic() - started)
        on_results(summary, new)

    summary.is_limited = bool(todo) and doing(todo, known, tell)
    assemble(job, summary)
    summary.seconds = time.monotonic() - started
    job.journal.write_errors(job.source.units)
    return summary


def do(job: Job, units: Iterable[Unit], known: Known, work: Work, heard: OnUnitResults) -> bool:
    """Process these units except for ``known`` results. True if a limit ended it. Raises CollectionError, OSError.

    The model's outputs go to the journal at once. A separate thread writes outputs and calls ``heard``, so that the
    model does not wait for the disk.
    """
    cut: set[int] = set()

    def write(settled: Iterator[Settled]) -> None:
        for unit, results in _by_unit(settled, cut):
            done = []
            for some in _written(job, results):
                heard(unit, some)
                done += some
            if unit.number in cut:
                continue
            for sink in job.sinks:
                sink.unit(unit, done)
            job.journal.finish(unit, job.source.stamp(unit), done)
            heard(unit, None)

    in_background(_kept(job, _settled(job, units, known, work, cut), known), write, MOST_WAITING)
    return bool(cut)


def assemble(job: Job, summary: Summary) -> None:
    """Write the outputs of all units, if all are finished, by whichever run; with a limit, of the results so far."""
    units = job.source.units
    summary.is_complete = all(job.journal.stamp_of(unit) == job.source.stamp(unit) for unit in units)
    if not (summary.is_complete or (summary.is_limited and job.shard[1] == 1)):
        return
    with job.journal.assembling() as is_ours:
        if is_ours:
            if summary.is_complete:
                job.journal.forget_beyond(len(units))
            with job.journal.writing(job.output):
                for sink in job.sinks:
                    sink.whole(_All(job.journal, units))
    summary.notes = [note for sink in job.sinks for note in sink.notes]


@dataclass(frozen=True)
class _All:
    """The results of all finished units."""

    journal: Journal
    units: Sequence[Unit]

    def __iter__(self) -> Iterator[Result]:
        return (result for unit in self.units for result in self.journal.so_far(unit))


def _total(job: Job) -> int | None:
    """Records of this shard, if the number is known before they are read."""
    if (total := job.source.num_records) is None or job.shard[1] == 1:
        return total
    everything, own = (sum(unit.stop - unit.start for unit in units) for units in (job.source.units, job.units))
    return total * own // everything if everything > 0 else None


def _is_done(job: Job, unit: Unit, summary: Summary) -> bool:
    if job.journal.stamp_of(unit) != job.source.stamp(unit):
        return False
    statuses = job.journal.statuses(unit)
    if job.retries and statuses[FAILED]:
        return False
    summary.before += statuses.total()
    summary.failed_before += statuses[FAILED]
    return True


def _known(job: Job) -> Known:
    """Results of units that are unfinished or have changed, by key and stamp."""
    done = {unit.name for unit in job.source.units if job.journal.stamp_of(unit) == job.source.stamp(unit)}
    if job.retries:
        done -= {unit.name for unit in job.units}
    return {
        (result.key, result.stamp): result
        for result in job.journal.earlier(without=done)
        if not (job.retries and result.status == FAILED)
    }


def _settled(
    job: Job, units: Iterable[Unit], known: Known, work: Work, cut: set[int]
) -> Generator[Settled, None, None]:
    """The result of each record, in order. Results that need no model are queued behind those that do.

    Ends within or before a unit in which the limit is reached; its number is added to ``cut``.
    """
    wants = frozenset[str]().union(*(sink.wants for sink in job.sinks))

    feed = Feed(
        job.source, units, job.journal, partial(without_model, job, known, wants), partial(begun, wants),
        partial(_repeated, job) if job.dedupes else None, job.limit, again=not job.retries,
    )  # fmt: skip
    outcomes = work(feed)
    try:
        for outcome in outcomes:
            yield from feed.ready_results()
            unit, pending = feed.next_pending()
            if pending.is_known:
                yield unit, pending.result
            elif not pending.is_left:
                pending.first.result = result = result_of(job, pending.record, pending.result, outcome)
                yield unit, result
            yield from feed.ready_results()
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()
    yield from feed.ready_results()
    cut |= feed.cut


def _repeated(job: Job, copy: Copy) -> Result:
    """The result of a copy from that of the first image, worded for the copy."""
    first = copy.first.result
    assert first is not None
    known = replace(copy.result, copy_of=first.key)
    if first.status == FAILED:
        return failed(known, f"{name_of(copy.record.name)}: {why_failed(first)}")
    return result_of(job, copy.record, known, Outcome(first.captions, first.scores, first.tokens))


def _by_unit(settled: Iterator[Settled], cut: set[int]) -> Iterator[tuple[Unit, Iterator[Result]]]:
    """The results of each unit, as they arrive. The number of an unfinished unit is added to ``cut``."""

    def until_end(unit: Unit, first: Result | None) -> Iterator[Result]:
        result = first
        while result is not None:
            yield result
            if (following := next(settled, None)) is None:
                cut.add(unit.number)
                return
            result = following[1]

    for unit, result in settled:
        yield unit, until_end(unit, result)


def _kept(job: Job, settled: Generator[Settled, None, None], known: Known) -> Generator[Settled, None, None]:
    """The same results, once they are in the journal."""
    part: Part | None = None
    with closing(settled), ExitStack() as stack:
        for unit, result in settled:
            if result is None:
                part = None
                stack.close()
            else:
                part = part or stack.enter_context(closing(job.journal.part(unit)))
                part.add(result, is_new=(result.key, result.stamp) not in known)
            yield unit, result


def _written(job: Job, results: Iterator[Result]) -> Iterator[list[Result]]:
    """The results, a few at a time, once their per-image outputs are written."""
    some: list[Result] = []
    last_s = -FLUSH_S
    for result in chain(results, [None]):
        some += [] if result is None else [result]
        is_time = len(some) >= FLUSH_RESULTS and time.monotonic() - last_s >= FLUSH_S
        if some and (is_time or result is None):
            if captioned := [each for each in some if each.status == SUCCESS]:
                for sink in job.sinks:
                    sink.some(captioned)
            yield some
            some, last_s = [], time.monotonic()
