"""All connections of a server. When there are too many, one that does nothing gives way to the newcomer."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Any, Protocol

STATE = "blip2.house"
"""Where the state of the application's lifespan has the house, so that each connection finds it."""
MAX_CONNECTIONS = 1024
STARTS_PER_TURN = 16
"""Requests that are begun in one turn of the event loop, so that no turn takes long, however many have come."""
LOCAL = "local"
"""The origin of whoever comes without an address: through a Unix socket."""


class Standing(IntEnum):
    """What a connection does at present. Those that do least come first, and give way first; work never does."""

    SILENT = 0
    """No whole head of a request has come, or not the next one's, which has begun."""
    IDLE = 1
    """All that came is answered."""
    BODY = 2
    """A head is there, its body is not."""
    UNREAD = 3
    """An answer waits to be read."""
    WORK = 4
    """A whole request is being answered."""


class Guest(Protocol):
    """A connection, as the house sees it."""

    @property
    def standing(self) -> Standing: ...

    @property
    def origin(self) -> str: ...

    @property
    def since_s(self) -> float:
        """When it came, or was answered last; of the event loop's clock."""
        ...

    def give_way(self) -> None: ...


class House:
    """``max_connections``: beyond it one gives way. ``on_refusal`` is told why a connection was ended."""

    def __init__(
        self, max_connections: int = MAX_CONNECTIONS, on_refusal: Callable[[str], Any] = lambda reason: None
    ) -> None:
        self.max_connections = max_connections
        self.refuse = on_refusal
        self.starts = Starts()
        self._guests: dict[Guest, None] = {}
        self._next: list[tuple[Standing, float, Guest]] = []
        """Those that give way next, the first of them last, as far as they still do what they did."""

    def enter(self, guest: Guest) -> None:
        """A newcomer is always let in."""
        if len(self._guests) < self.max_connections:
            self._next.clear()
        elif (least := self._least()) is not None:
            del self._guests[least]
            self.refuse("connection_gave_way")
            least.give_way()
        self._guests[guest] = None

    def leave(self, guest: Guest) -> None:
        self._guests.pop(guest, None)

    def count(self) -> Counter[Standing]:
        return Counter(guest.standing for guest in self._guests)

    def _least(self) -> Guest | None:
        """Of the origin that has most connections at which nothing is worked: the one that does least, for longest.

        So a crowd from one address costs nobody else a connection. None if all are being worked for.
        """
        while True:
            while self._next:
                standing, since_s, guest = self._next.pop()
                if guest in self._guests and (guest.standing, guest.since_s) == (standing, since_s):
                    return guest
            found = [(guest.standing, guest.since_s, guest) for guest in self._guests]
            found = [each for each in found if each[0] != Standing.WORK]
            crowd = Counter(guest.origin for _, _, guest in found)
            found.sort(key=lambda each: (-crowd[each[2].origin], *each[:2]))
            # To look at all of them takes milliseconds, and there may be hundreds of newcomers at a time.
            self._next = found[: max(self.max_connections // 32, 1)][::-1]
            if not found:
                return None


class Starts:
    """Begins the work on requests, a few in each turn of the event loop.

    A request that came when its connection had no other goes before those that were sent ahead of their turn.
    """

    def __init__(self) -> None:
        self._first: deque[Callable[[], None]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._num_begun = 0
        self._has_turn = False

    def add(self, loop: asyncio.AbstractEventLoop, begin: Callable[[], None], *, is_later: bool) -> None:
        if self._num_begun < STARTS_PER_TURN and not self._first and not (is_later and self._later):
            self._num_begun += 1
            begin()
        else:
            (self._later if is_later else self._first).append(begin)
        if not self._has_turn:
            self._has_turn = True
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_begun = 0
        while (self._first or self._later) and self._num_begun < STARTS_PER_TURN:
            self._num_begun += 1
            is_last = self._num_begun == STARTS_PER_TURN  # of each turn one, so that nobody waits for ever
            (self._later if self._later and (is_last or not self._first) else self._first).popleft()()
        self._has_turn = self._num_begun > 0
        if self._has_turn:
            loop.call_soon(self._turn, loop)


@lru_cache(1024)
def origin_of(host: str | None) -> str:
    """Whose connections are counted together: an IPv4 address, the /64 of an IPv6 address, else `LOCAL`."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or LOCAL
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address.ipv4_mapped)
    return str(address)
