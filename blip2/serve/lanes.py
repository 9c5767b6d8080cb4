"""Two batches, so that who asks little is not slowed down by who asks much.

A step of a batch takes the longer the more rows it has: one with 64 beams six times as long as one with a single answer
(the miniature on a CPU). So what is large by itself, or by what else its client has running, is written in a lane of
its own, and the two lanes and the other work of the models' thread have shares of its time (`Share`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from blip2.generation import Batch, Job
from blip2.language import LanguageModel
from blip2.serve.tickets import Running, Ticket
from blip2.serve.turns import Turns

PORTION = 8
"""Prompts that are read, and images that are encoded, before others have their turn."""
PORTION_CHARACTERS = 8192
"""Of prompts that are read together."""
QUICK_TOKENS = 64
"""Of a row, on average, that is quickly written: those of long ones have much to look back at in each step."""


@dataclass(eq=False)
class Share:
    """Of the thread's time, by weight, among those that have something to do."""

    weight: float
    spent_s: float = 0.0
    """By its weight; the one that has spent least is the next."""


def next_of(shares: Iterable[Share], busy: Sequence[Share]) -> Share:
    """Whose turn it is. Who has nothing to do saves up nothing."""
    chosen = min(busy, key=lambda each: each.spent_s)
    for share in shares:
        if share not in busy:
            share.spent_s = max(share.spent_s, chosen.spent_s)
    return chosen


@dataclass(eq=False)
class Lane(Share):
    """A batch: the answers that are running in it, and the tickets that have a place but are not running yet."""

    language: LanguageModel = field(kw_only=True)
    batch: Batch = field(init=False)
    running: dict[Job, Running] = field(default_factory=dict)
    coming: deque[Ticket] = field(default_factory=deque)
    fresh: list[Ticket] = field(default_factory=list)
    """Those of the running ones that have no token yet."""
    may_admit: bool = True
    """Whether its next portion is to admit; it is not after one that did, if others have something to do."""

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is running in it any more."""
        self.batch = Batch(self.language)
        self.running.clear()
        self.fresh.clear()

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.coming)

    @property
    def num_rows(self) -> int:
        return self.batch.num_rows + sum(ticket.num_rows for ticket in self.coming)

    @property
    def tickets(self) -> list[Ticket]:
        return [*self.coming, *(running.ticket for running in self.running.values())]

    def portion(self, num_pictures: int) -> list[Ticket]:
        """Some of those that are coming: the prompts short enough, and few enough of the images new."""
        some: list[Ticket] = []
        num_new = num_characters = 0
        while self.coming and len(some) < PORTION:
            ticket = self.coming[0]
            num_new += ticket.look.kept is None
            num_characters += len(ticket.text)
            if some and (num_new > num_pictures or num_characters > PORTION_CHARACTERS):
                break
            some.append(self.coming.popleft())
        return some


class Lanes:
    """``quick`` is for those who have little running, ``bulk`` for searches with many beams and for all that a client
    asks beyond that, until it has nothing there any more.

    ``bulk`` has ``max_rows``, ``quick`` what is free of these and a quarter as many of its own, so that a search that
    fills ``bulk`` leaves room for others.
    """

    def __init__(self, language: LanguageModel, max_rows: int) -> None:
        self.max_rows = max_rows
        self._num_spare = max_rows // 4
        self._num_quick = max_rows // 8  # of one client
        self.quick, self.bulk = Lane(2, language=language), Lane(1, language=language)
        self.each = (self.quick, self.bulk)

    @property
    def is_busy(self) -> bool:
        return self.quick.is_busy or self.bulk.is_busy

    @property
    def tickets(self) -> list[Ticket]:
        return [*self.quick.tickets, *self.bulk.tickets]

    def allot(self, waiting: Turns[Ticket]) -> None:
        """Gives those who wait the rows that are free, in turn.

        Who needs more than are free is overtaken, until that was done by as many rows as there are; from then on rows
        are kept free for him.
        """
        quick, bulk = self.quick, self.bulk
        rows, tokens = Counter[str](), Counter[str]()  # of what is not large by itself
        busy = {ticket.client for ticket in bulk.tickets if self._is_narrow(ticket)}
        for ticket in filter(self._is_narrow, self.tickets):
            rows[ticket.client] += ticket.num_rows
            tokens[ticket.client] += ticket.num_tokens
        overtaken: list[Ticket] = []
        is_bulk_closed = is_quick_closed = False
        for ticket in waiting.in_turn():
            client, is_narrow = ticket.client, self._is_narrow(ticket)
            is_little = (
                rows[client] + ticket.num_rows <= self._num_quick
                and tokens[client] + ticket.num_tokens <= self._num_quick * QUICK_TOKENS
            )
            is_quick = is_narrow and is_little and client not in busy
            free = self.max_rows + self._num_spare - quick.num_rows - bulk.num_rows
            free_bulk = 0 if is_bulk_closed else self.max_rows - bulk.num_rows
            if not is_quick:
                free = min(free, free_bulk)
            elif is_quick_closed:
                free = min(free, self._num_spare - quick.num_rows)
            if ticket.num_rows > free:
                overtaken.append(ticket)
                if ticket.num_overtaken >= self.max_rows:
                    is_quick_closed |= ticket.num_rows <= free_bulk
                    is_bulk_closed = True
                continue
            waiting.take(ticket)
            (quick if is_quick else bulk).coming.append(ticket)
            if is_narrow:
                rows[client] += ticket.num_rows
                tokens[client] += ticket.num_tokens
                busy |= set() if is_quick else {client}
            for other in overtaken:
                other.num_overtaken += ticket.num_rows

    def _is_narrow(self, ticket: Ticket) -> bool:
        return ticket.num_rows <= self._num_quick
