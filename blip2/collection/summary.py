"""What a run did, counted while it is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blip2.collection.record import FAILED, SKIPPED, SUCCESS, Result
from blip2.collection.results import why_failed


@dataclass
class Summary:
    """Counts of images: of this run, and of those before it (``before``, of which ``failed_before``).

    ``total``: of all that the source has, or this part of it; None if that is not known. ``reasons``: why images
    failed, the images' names left out. ``copies``: of this run, that were not seen since an equal one was.
    ``repeated``: captions of this run that another image has, too, which is no copy.
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
    """Whether all units are done, those of other shards included, so that the output is whole."""
    is_limited: bool = False
    """Whether it ended because `Job.limit` was reached."""
    notes: list[str] = field(default_factory=list)
    """What the formats have to tell of what they wrote."""
    _first: tuple[int, float] | None = None
    _last: tuple[int, float] = (0, 0.0)
    _said: set[int] = field(default_factory=set, repr=False)

    @property
    def rate(self) -> float:
        """Images a second, of this run, after its first few, before which a model is loaded; 0 before these."""
        (number, since_s), (new, until_s) = self._first or (0, 0.0), self._last
        if new == number:  # there are no more than these
            number, since_s = 0, 0.0
        return (new - number) / (until_s - since_s) if until_s > since_s else 0.0

    def clock(self, seconds: float) -> None:
        """So long it takes by now."""
        self.seconds = seconds
        if new := self.done + self.failed:
            self._last = (new, seconds)
            self._first = self._first or self._last

    @property
    def settled(self) -> int:
        """Of this run and of those before it."""
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
            said = hash(result.line)
            self.repeated += said in self._said
            self._said.add(said)


OnResults = Callable[[Summary, Sequence[Result]], None]
"""Is called after every few results of this run, with these, by another thread than the model's."""
