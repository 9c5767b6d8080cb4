"""All connections of a server. When there are too many, one that does nothing gives way to the newcomer."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import Any, Protocol

STATE = "blip2.house"
"""Where the state of the application's lifespan has the house, so that each connection finds it."""
MAX_CONNECTIONS = 1024
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
        self._guests: dict[Guest, None] = {}

    def enter(self, guest: Guest) -> None:
        """A newcomer is always let in."""
        if len(self._guests) >= self.max_connections and (least := self._least()) is not None:
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
        found = [(guest.standing, guest.since_s, guest) for guest in self._guests]
        found = [each for each in found if each[0] != Standing.WORK]
        crowd = Counter(guest.origin for _, _, guest in found)
        return min(found, key=lambda each: (-crowd[each[2].origin], *each[:2]))[2] if found else None


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
