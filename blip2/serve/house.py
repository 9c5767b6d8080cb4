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
STARTS_PER_TURN = 2
"""Requests that are begun in one turn of the event loop, so that no turn takes long, however many have come: uvloop
accepts one connection a turn."""
YOUNG_S = 1.0
"""So long a connection that says nothing yet is taken for one whose request is on its way."""
LOCAL = "local"
"""The origin of whoever comes without an address: through a Unix socket."""


class Standing(IntEnum):
    """What a connection does at present. Those that do least come first, and give way first; work never does."""

    SILENT = 0
    """No whole head of a request has come, or not the next one's, which has begun."""
    IDLE = 1
    """All that came is answered."""
    BODY = 2
    """A head is there, its body is not, or nobody has looked at it yet."""
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

    def __len__(self) -> int:
        return len(self._guests)

    def enter(self, guest: Guest) -> None:
        """A newcomer is always let in."""
        now_s = guest.since_s
        if len(self._guests) < self.max_connections:
            self._next.clear()
        while len(self._guests) >= self.max_connections and (least := self._least(now_s)) is not None:
            if _is_young(least, now_s) and len(self._guests) < self.max_connections * 5 // 4:
                break  # everybody is at work, or has just come
            del self._guests[least]
            self.refuse("connection_gave_way")
            least.give_way()
        self._guests[guest] = None

    def leave(self, guest: Guest) -> None:
        self._guests.pop(guest, None)

    def count(self) -> Counter[Standing]:
        return Counter(guest.standing for guest in self._guests)

    def _least(self, now_s: float) -> Guest | None:
        """Of the origin that has most connections at which nothing is worked: the one that does least, for longest.

        So a crowd from one address costs nobody else a connection. None if all are being worked for.
        """
        while True:
            while self._next:
                standing, since_s, guest = self._next[-1]
                if guest in self._guests and (guest.standing, guest.since_s) == (standing, since_s):
                    return guest
                self._next.pop()
            found = [(guest.standing, guest.since_s, guest) for guest in self._guests]
            found = [each for each in found if each[0] != Standing.WORK]
            if not found:
                return None
            crowd = Counter(guest.origin for _, _, guest in found)

            ranked = sorted(
                (-crowd[guest.origin], Standing.BODY if _is_young(guest, now_s) else standing, since_s, place)
                for place, (standing, since_s, guest) in enumerate(found)
            )
            # To look at all of them takes milliseconds, and there may be hundreds of newcomers at a time.
            self._next = [found[place] for *_, place in ranked[: max(self.max_connections // 32, 1)]][::-1]


def _is_young(guest: Guest, now_s: float) -> bool:
    return guest.standing == Standing.SILENT and now_s - guest.since_s < YOUNG_S


class Lane(IntEnum):
    """Which requests are begun first, when many wait for that."""

    EXPRESS = 0
    """Of those who watch the server."""
    FRESH = 1
    """It came when its connection had no other."""
    AHEAD = 2
    """It was sent before an earlier one was answered."""


class Starts:
    """Begins the work on requests, a few in each turn of the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[Lane, deque[Callable[[], None]]] = {lane: deque() for lane in Lane}
        self._num_begun = 0
        self._has_turn = False

    def add(self, loop: asyncio.AbstractEventLoop, begin: Callable[[], None], lane: Lane) -> None:
        self._waiting[lane].append(begin)
        self._begin()
        if not self._has_turn:
            self._has_turn = True
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_begun = 0
        self._begin()
        self._has_turn = self._num_begun > 0
        if self._has_turn:
            loop.call_soon(self._turn, loop)

    def _begin(self) -> None:
        while self._num_begun < STARTS_PER_TURN and (lane := self._next()) is not None:
            self._num_begun += 1
            lane.popleft()()

    def _next(self) -> deque[Callable[[], None]] | None:
        return next((waiting for waiting in self._waiting.values() if waiting), None)


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
