"""A queue in which clients take turns, so that a client with many requests does not hold up the others."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from itertools import chain, count, zip_longest
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """Clients are served round-robin; within a client the smallest item first, and among equals the oldest.

    An item can only be in it once, and has to be hashable.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, list[tuple[float, int, Item]]] = OrderedDict()
        self._client_of: dict[Item, str] = {}
        self._number = count()

    def __len__(self) -> int:
        return len(self._client_of)

    def push(self, client: str, item: Item, size: float = 0) -> None:
        heapq.heappush(self._waiting.setdefault(client, []), (size, next(self._number), item))
        self._client_of[item] = client

    def __iter__(self) -> Iterator[Item]:
        return iter(list(self._client_of))

    def client_of(self, item: Item) -> str:
        return self._client_of[item]

    def in_turn(self) -> Iterator[Item]:
        """All waiting items, in the order of `pop`."""
        rounds = zip_longest(*(sorted(entries) for entries in self._waiting.values()))
        return (entry[2] for entry in chain.from_iterable(rounds) if entry is not None)

    def peek(self) -> Item:
        """The item that `pop` would return. Raises IndexError if there is none."""
        if not self._client_of:
            raise IndexError("the queue is empty")
        return next(iter(self._waiting.values()))[0][2]

    def pop(self) -> Item:
        """The next item; the client's next one waits for the other clients."""
        item = self.peek()
        self.take(item)
        return item

    def take(self, item: Item) -> None:
        """Like `pop`, for an item that is not the next."""
        client = self._client_of[item]
        self.remove(item)
        if client in self._waiting:
            self._waiting.move_to_end(client)

    def remove(self, item: Item) -> None:
        """Remove an item; does nothing if it is not in the queue."""
        client = self._client_of.pop(item, None)
        if client is None:
            return
        rest = self._waiting[client]
        if rest[0][2] is item:
            heapq.heappop(rest)
        else:
            rest[:] = [entry for entry in rest if entry[2] is not item]
            heapq.heapify(rest)
        if not rest:
            del self._waiting[client]


class FairPool(Generic[Item]):
    """A limited number of things, lent to waiting clients in turn. For one event loop."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._free = list(items)
        self._waiting: Turns[asyncio.Future[Item]] = Turns()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free(self) -> int:
        return len(self._free)

    async def take(self, client: str, size: float = 0) -> Item:
        if self._may_take(client):
            return self._given(client)
        coming: asyncio.Future[Item] = asyncio.get_running_loop().create_future()
        self._waiting.push(client, coming, size)
        try:
            return await coming
        except asyncio.CancelledError:
            self._waiting.remove(coming)
            if coming.done() and not coming.cancelled():
                self.offer(coming.result())
            raise

    @asynccontextmanager
    async def lease(self, client: str, size: float = 0) -> AsyncIterator[Item]:
        item = await self.take(client, size)
        try:
            yield item
        finally:
            self.offer(item)

    def offer(self, item: Item) -> None:
        """Give the thing to the next client, or keep it free."""
        while len(self._waiting):
            coming = self._waiting.pop()
            if not coming.done():
                coming.set_result(item)
                return
        self._free.append(item)

    def withdraw(self, item: Item) -> None:
        """Remove a thing, if it is not lent."""
        if item in self._free:
            self._free.remove(item)

    def _may_take(self, client: str) -> bool:
        return bool(self._free)

    def _given(self, client: str) -> Item:
        return self._free.pop()


class ReservingPool(FairPool[Item]):
    """A `FairPool` whose last free thing is reserved for a client that has none. Things have to be hashable."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        super().__init__(items)
        self._client_of: dict[Item, str] = {}
        self._number_of: Counter[str] = Counter()

    def offer(self, item: Item) -> None:
        self._free.append(item)
        self.forget(item)

    def withdraw(self, item: Item) -> None:
        super().withdraw(item)
        self.forget(item)

    def forget(self, item: Item) -> None:
        """No longer count the thing as the client's, although it may still have it."""
        client = self._client_of.pop(item, None)
        if client is not None:
            self._number_of[client] -= 1
            self._number_of += Counter()  # drop zero counts
        for coming in self._waiting.in_turn() if self._free and len(self._waiting) else ():
            client = self._waiting.client_of(coming)
            if self._may_take(client):
                self._waiting.take(coming)
                if not coming.done():
                    coming.set_result(self._given(client))

    def _may_take(self, client: str) -> bool:
        return len(self._free) > bool(self._number_of[client])

    def _given(self, client: str) -> Item:
        item = super()._given(client)
        self._client_of[item] = client
        self._number_of[client] += 1
        return item
