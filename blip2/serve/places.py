"""The queue's places: the number of requests in progress, per client, and how to end all of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits, share_of

SPARE_S = 1.0
"""Seconds after the deadline at which a request is ended from here; its route normally answers first."""
SOON = {"Retry-After": "1"}


class Places:
    """``max_queue`` places. One client gets at most three quarters, so that others always find one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._taken: Counter[str] = Counter()
        self._timers: set[asyncio.Timeout] = set()
        self._end: ApiError | None = None

    def __len__(self) -> int:
        return self._taken.total()

    def check(self, client: str) -> None:
        """Raises ApiError if there is no place for that client."""
        if len(self) >= self._limits.max_queue:
            raise ApiError(
                429, "queue_full", f"{len(self)} requests are already in progress; try again in a moment", headers=SOON
            )
        if self._taken[client] >= share_of(self._limits.max_queue):
            raise ApiError(
                429, "client_queue_full", f"{self._taken[client]} of your requests are in progress already; the other "
                "places are reserved for others; try again in a moment", headers=SOON,
            )  # fmt: skip

    @asynccontextmanager
    async def taken(self, client: str, end_s: float) -> AsyncGenerator[None, None]:
        """A place for the duration of a request. Work within is cancelled a little after ``end_s``.

        Raises ApiError if there is no place, at the deadline, and at `end_all`.
        """
        self.check(client)
        self._taken[client] += 1
        timer = asyncio.timeout(end_s + SPARE_S - time.monotonic())
        self._timers.add(timer)
        try:
            async with timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            raise self._end or too_late() from None
        finally:
            self._timers.discard(timer)
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]

    def end_all(self, error: ApiError) -> None:
        """End all requests in progress with this error."""
        self._end = error
        for timer in self._timers:
            if not timer.expired():
                timer.reschedule(0)


def too_late() -> ApiError:
    return ApiError(504, "deadline", "the deadline (--deadline of the server) has passed; try again later")
