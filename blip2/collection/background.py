"""A thread that takes what another makes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from queue import Queue
from threading import Thread
from typing import Any, TypeVar

Item = TypeVar("Item")


def in_background(items: Generator[Item, None, None], take: Callable[[Iterator[Item]], None], most: int) -> None:
    """Make items here, and have a thread take them, of which at most so many wait.

    If making them ends by an exception, an interrupt included, the thread takes first what is there. If the thread
    ends by one, no more are made. Either is raised here.
    """
    queue: Queue[Any] = Queue(most)
    end = object()
    raised: list[BaseException] = []

    def work() -> None:
        waiting = iter(queue.get, end)
        try:
            take(waiting)
        except BaseException as error:
            raised.append(error)
        for _ in waiting:  # so that nobody waits for room
            pass

    thread = Thread(target=work, name="blip2 writer", daemon=True)
    thread.start()
    try:
        with closing(items):
            for item in items:
                queue.put(item)
                if raised:
                    break
    finally:
        queue.put(end)
        thread.join()
    if raised:
        raise raised[0]
