"""Returns freed memory to the system."""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress

from blip2.checkpoint.reader import release_memory

IDLE_S = 1.0
M_ARENA_MAX = -8
"""glibc's number for `mallopt`."""


def share_one_arena() -> None:
    """Make all threads of the server share one malloc arena. Call it before threads start.

    By default glibc gives each thread an arena. Except for the first, it never returns their ends to the system, which
    are as large as the largest request of that thread.
    """
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class MemoryTrimmer:
    """Trims the heap after `IDLE_S` without requests. The C library would keep the memory of large bodies."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._last_s = 0.0

    def note(self) -> None:
        """Note that a request has ended. Called in the event loop."""
        loop = asyncio.get_running_loop()
        self._last_s = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(IDLE_S, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        left_s = self._last_s + IDLE_S - loop.time()
        if left_s > 0.01:
            self._timer = loop.call_later(left_s, self._look)
        else:
            self._timer = None
            loop.run_in_executor(None, release_memory)
