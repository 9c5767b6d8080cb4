"""Two running batches, so that small requests are not slowed down by large ones.

A decoding step takes longer the more rows the batch has: with 64 beams six times as long as with one answer (the
miniature on a CPU). So requests that are large, by themselves or with others of the same client, run in a separate
batch (a lane). The lanes and the other work of the models' thread share its time by weight (`Share`).
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
"""Prompts prefilled and images encoded in one turn."""
PORTION_CHARACTERS = 8192
"""Maximum characters of prompts prefilled together."""
QUICK_TOKENS = 64
"""Maximum average tokens of a row in the quick lane: long rows attend to many positions in each step."""


@dataclass(eq=False)
class Share:
    """A weighted share of the thread's time."""

    weight: float
    spent_s: float = 0.0
    """Time spent, divided by the weight. The share with the least is next."""


def next_of(shares: Iterable[Share], busy: Sequence[Share]) -> Share:
    """The share whose turn it is. Idle time is not saved up."""
    chosen = min(busy, key=lambda each: each.spent_s)
    for share in shares:
        if share not in busy:
            share.spent_s = max(share.spent_s, chosen.spent_s)
    return chosen


@dataclass(eq=False)
class Lane(Share):
    """A batch: its running answers, and the tickets that have rows but are not running yet."""

    language: LanguageModel = field(kw_only=True)
    batch: Batch = field(init=False)
    running: dict[Job, Running] = field(default_factory=dict)
    coming: deque[Ticket] = field(default_factory=deque)
    fresh: list[Ticket] = field(default_factory=list)
    """Running tickets without a token yet."""
    may_admit: bool = True
    """Whether its next turn admits tickets; it does not right after doing so, if others have work."""

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything that was running."""
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

    def portion(self, num_images: int) -> list[Ticket]:
        """Some of the coming tickets: with prompts short enough, and few enough new images."""
        some: list[Ticket] = []
        num_new = num_characters = 0
        while self.coming and len(some) < PORTION:
            ticket = self.coming[0]
            num_new += ticket.look.kept is None
            num_characters += len(ticket.text)
            if some and (num_new > num_images or num_characters > PORTION_CHARACTERS):
                break
            some.append(self.coming.popleft())
        return some


class Lanes:
    """``quick`` is for clients with few running rows. ``bulk`` is for searches with many beams, and for everything that
    a client requests beyond that, until it has nothing left there.

    ``bulk`` has ``max_rows``. ``quick`` has what these leave free, and a quarter as many of its own, so that a search
    that fills ``bulk`` leaves space for others.
    """

    def __init__(self, language: LanguageModel, max_rows: int) -> None:
        self.max_rows = max_rows
        self._num_spare = max_rows // 4
        self._num_quick = max_rows // 8  # per client
        self.quick, self.bulk = Lane(2, language=language), Lane(1, language=language)
        self.each = (self.quick, self.bulk)

    @property
    def is_busy(self) -> bool:
        return self.quick.is_busy or self.bulk.is_busy

    @property
    def tickets(self) -> list[Ticket]:
        return [*self.quick.tickets, *self.bulk.tickets]

    def allot(self, waiting: Turns[Ticket]) -> None:
        """Gives free rows to waiting tickets, in turn.

        A ticket that needs more rows than are free is overtaken, until as many rows as exist have overtaken it; from
        then on rows are reserved for it.
        """
        quick, bulk = self.quick, self.bulk
        rows, tokens = Counter[str](), Counter[str]()  # of requests that are not large by themselves
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
