"""All connections of a server. If there are too many, an idle one is closed for a new one."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Any, Protocol

STATE = "blip2.connections"
"""Key of the `Connections` in the application's lifespan state, where each connection finds it."""
MAX_CONNECTIONS = 1024
STARTS_PER_TURN = 2
"""Requests started in one turn of the event loop, so that no turn takes long, however many have arrived. uvloop accepts
one connection per turn."""
NEW_S = 1.0
"""Seconds for which a silent new connection is assumed to have a request on its way."""
LOCAL = "local"
"""The origin of connections without an address, through a Unix socket."""


class Activity(IntEnum):
    """The state of a connection. The first ones are closed first; a working one is never closed."""

    SILENT = 0
    """The head of a request is incomplete (the first, or the next one, which has begun)."""
    IDLE = 1
    """Idle: everything received is answered."""
    BODY = 2
    """The head is complete, the body is not, or the request is not yet started."""
    UNREAD = 3
    """An answer is waiting to be read by the client."""
    WORK = 4
    """A complete request is being answered."""


class OpenConnection(Protocol):
    """A connection, as `Connections` needs it."""

    @property
    def activity(self) -> Activity: ...

    @property
    def origin(self) -> str: ...

    @property
    def since_s(self) -> float:
        """The time of its arrival or its last answer, on the event loop's clock."""
        ...

    def evict(self) -> None: ...


class Connections:
    """``max_connections``: beyond it one is closed. ``on_refusal`` gets the reason why a connection was closed."""

    def __init__(
        self, max_connections: int = MAX_CONNECTIONS, on_refusal: Callable[[str], Any] = lambda reason: None
    ) -> None:
        self.max_connections = max_connections
        self.refuse = on_refusal
        self.starts = Starts()
        self._connections: dict[OpenConnection, None] = {}
        self._next: list[tuple[Activity, float, OpenConnection]] = []
        """Connections to close next, the first one last, if their state is unchanged by then."""

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: OpenConnection) -> None:
        """Adds a connection. New connections are always accepted."""
        now_s = connection.since_s
        if len(self._connections) < self.max_connections:
            self._next.clear()
        while len(self._connections) >= self.max_connections and (least := self._least(now_s)) is not None:
            if _is_new(least, now_s) and len(self._connections) < self.max_connections * 5 // 4:
                break  # all connections are working or have just arrived
            del self._connections[least]
            self.refuse("connection_gave_way")
            least.evict()
        self._connections[connection] = None

    def remove(self, connection: OpenConnection) -> None:
        self._connections.pop(connection, None)

    def count(self) -> Counter[Activity]:
        return Counter(connection.activity for connection in self._connections)

    def _least(self, now_s: float) -> OpenConnection | None:
        """The connection to close: of the origin with most connections, the longest in the lowest state.

        So many connections from one address cost nobody else a connection. None if all are working.
        """
        while True:
            while self._next:
                activity, since_s, connection = self._next[-1]
                if connection in self._connections and (connection.activity, connection.since_s) == (activity, since_s):
                    return connection
                self._next.pop()
            found = [(connection.activity, connection.since_s, connection) for connection in self._connections]
            found = [each for each in found if each[0] != Activity.WORK]
            if not found:
                return None
            num_by_origin = Counter(connection.origin for _, _, connection in found)

            ranked = sorted(
                (-num_by_origin[each.origin], Activity.BODY if _is_new(each, now_s) else activity, since_s, place)
                for place, (activity, since_s, each) in enumerate(found)
            )
            # Scanning all connections takes milliseconds, and hundreds of new ones may arrive at once.
            self._next = [found[place] for *_, place in ranked[: max(self.max_connections // 32, 1)]][::-1]


def _is_new(connection: OpenConnection, now_s: float) -> bool:
    return connection.activity == Activity.SILENT and now_s - connection.since_s < NEW_S


class Lane(IntEnum):
    """The order in which waiting requests are started."""

    EXPRESS = 0
    """Requests of monitoring."""
    FRESH = 1
    """The only request of its connection."""
    AHEAD = 2
    """A pipelined request, sent before an earlier one was answered."""


class Starts:
    """Starts requests, a few in each turn of the event loop."""

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
    """The group in which connections are counted: an IPv4 address, the /64 of an IPv6 address, else `LOCAL`."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or LOCAL
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address.ipv4_mapped)
    return str(address)
