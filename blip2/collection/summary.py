"""Counts of a run, updated while it is running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blip2.collection.record import FAILED, SKIPPED, SUCCESS, Result
from blip2.collection.results import why_failed


@dataclass
class Summary:
    """Counts of images: of this run, and of earlier ones (``before``, of which ``failed_before``).

    ``total``: of the whole source, or this part of it; None if unknown. ``reasons``: why images failed, without their
    names. ``copies``: images of this run that were not processed, since an equal one was. ``repeated``: captions of
    this run that another image, which is not a copy, has as well.
    """

    done: int = 0
    skipped: int = 0
    failed: int = 0
    before: int = 0
    failed_before: int = 0
    copies: int = 0
    repeated: int = 0
    total: int | None = None
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    is_complete: bool = False
    """Whether all units are finished, also those of other shards, so that the output is complete."""
    is_limited: bool = False
    """Whether it ended because `Job.limit` was reached."""
    notes: list[str] = field(default_factory=list)
    """Notes of the output formats."""
    _first: tuple[int, float] | None = None
    _last: tuple[int, float] = (0, 0.0)
    _hashes_seen: set[int] = field(default_factory=set, repr=False)

    @property
    def rate(self) -> float:
        """Images per second of this run, without its first few, which include loading the model; 0 before these."""
        (number, since_s), (new, until_s) = self._first or (0, 0.0), self._last
        if new == number:  # there are no others
            number, since_s = 0, 0.0
        return (new - number) / (until_s - since_s) if until_s > since_s else 0.0

    def clock(self, seconds: float) -> None:
        """Record the elapsed seconds."""
        self.seconds = seconds
        if new := self.done + self.failed:
            self._last = (new, seconds)
            self._first = self._first or self._last

    @property
    def settled(self) -> int:
        """Images of this run and of earlier ones."""
        return self.done + self.skipped + self.failed + self.before

    def count(self, result: Result, *, is_new: bool) -> None:
        if not is_new:
            self.before += 1
            self.failed_before += result.status == FAILED
            return
        self.done += result.status == SUCCESS
        self.skipped += result.status == SKIPPED
        self.failed += result.status == FAILED
        if result.status == FAILED:
            self.reasons[why_failed(result)] += 1
        self.copies += bool(result.copy_of)
        if result.status == SUCCESS and not result.copy_of:
            line_hash = hash(result.line)
            self.repeated += line_hash in self._hashes_seen
            self._hashes_seen.add(line_hash)


OnResults = Callable[[Summary, Sequence[Result]], None]
"""Called after every few results of this run, with these results, by another thread than the model's."""
