"""A background thread that consumes items while the caller produces them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from queue import Queue
from threading import Thread
from typing import Any, TypeVar

Item = TypeVar("Item")


def in_background(items: Generator[Item, None, None], take: Callable[[Iterator[Item]], None], most: int) -> None:
    """Produce items in this thread and consume them in another, through a bounded queue.

    If producing raises (also KeyboardInterrupt), the thread first consumes what is queued. If consuming raises,
    producing stops. Either exception is raised here.
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
        for _ in waiting:  # so that the producer does not block on a full queue
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
