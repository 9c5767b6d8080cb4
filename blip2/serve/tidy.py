"""Memory that requests have left free goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress

from blip2.checkpoint.reader import give_back_memory

IDLE_S = 1.0
M_ARENA_MAX = -8
"""glibc's number for `mallopt`."""


def share_one_arena() -> None:
    """For a process that serves: all its threads take memory from one place. Call it before threads begin.

    By default glibc gives each thread an arena, and of these, but for the first, it never returns the end to the
    system, which is as large as the largest request of that thread.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class Tidy:
    """Once nobody has asked anything for `IDLE_S`. The C library would keep what large bodies have taken."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._last_s = 0.0

    def note(self) -> None:
        """A request is over. In the event loop."""
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
            loop.run_in_executor(None, give_back_memory)
