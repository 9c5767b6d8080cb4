"""One replica in Ray Serve: an application that gets requests and returns answers through calls.

It is a complete server with its own queue and limits, except that the front process checks keys and hosts.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Scope

from blip2 import errors
from blip2.checkpoint.reader import release_memory
from blip2.serve.admission import END
from blip2.serve.service import Models
from blip2.serve.trimmer import share_one_arena

LOAD_ERROR = "blip2 was not loaded: "
DEATH_S = 0.2
"""Seconds between checks whether the model is alive."""
TRIM_AFTER_BYTES, TRIM_INTERVAL_S = 2**25, 20.0
"""Bytes of bodies after which freed memory is returned to the system, at most once in this many seconds."""

Create = Callable[[Callable[[], Models], str], FastAPI]


class MemoryTrimmer:
    """Returns freed memory to the system: the C library would keep the pieces of large bodies."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._last_s = time.monotonic()

    def note(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes

    def look(self) -> None:
        """Call this now and then, in a thread."""
        if self._num_bytes >= TRIM_AFTER_BYTES and time.monotonic() - self._last_s > TRIM_INTERVAL_S:
            self._num_bytes, self._last_s = 0, time.monotonic()
            release_memory()


def replica_of(serve: Any, load: Callable[[], Models], create: Create) -> type:
    """The class of which Ray makes replicas."""

    class Replica:
        app: FastAPI

        def __init__(self) -> None:
            share_one_arena()
            # Load first, so that no request arrives earlier, and an error ends the start.
            try:
                models = load()
            except Exception as error:
                raise RuntimeError(LOAD_ERROR + json.dumps([type(error).__name__, str(error)])) from error
            self.app = create(lambda: models, serve.get_replica_context().replica_id.unique_id)
            self._trimmer = MemoryTrimmer()
            self._ended = asyncio.Event()
            self._living: asyncio.Task[None] | None = asyncio.create_task(self._live())

        async def _live(self) -> None:
            async with self.app.router.lifespan_context(self.app):
                watch = asyncio.create_task(self._exit_with_model())
                await self._ended.wait()
                watch.cancel()

        def __del__(self) -> Coroutine[Any, Any, Any] | None:
            """Called and awaited by Ray when a replica is to end."""
            living, self._living = getattr(self, "_living", None), None
            if living is None:
                return None
            self._ended.set()
            return asyncio.wait((living,))

        async def check_health(self) -> None:
            """Called by Ray before the first request and then every few seconds; an error makes it start a new
            replica."""
            service = self.app.state.service
            while (refusal := service.refusal()) is not None and refusal.code == "loading":
                await asyncio.sleep(0.01)
            if refusal is not None and refusal.code != "stopping":
                raise RuntimeError(refusal.message)

        async def _exit_with_model(self) -> None:
            """End the process, since Ray needs several failed health checks, during which requests would arrive
            here."""
            while (refusal := self.app.state.service.refusal()) is None or refusal.code in ("loading", "stopping"):
                await asyncio.sleep(DEATH_S)
                await asyncio.to_thread(self._trimmer.look)
            os._exit(1)

        async def answer(self, scope: Scope, left_s: float, *body: bytes) -> AsyncGenerator[bytes, None]:
            """Lists of pickled ASGI messages: those that the application has sent since the last list."""
            scope[END] = time.monotonic() + left_s
            self._trimmer.note(sum(map(len, body)))
            async for messages in messages_of(self.app, scope, [b"".join(body)]):
                yield pickle.dumps(messages)

        async def families(self) -> bytes:
            """Its metrics, pickled."""
            return pickle.dumps(self.app.state.service.metrics.families())

    return Replica


async def messages_of(app: Any, scope: Scope, body: list[bytes]) -> AsyncGenerator[list[Message], None]:
    """An application's messages for a request. Closing it early is a disconnect for the application.

    ``body``: emptied when the application takes it.
    """
    closed = asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await closed.wait()
        return {"type": "http.disconnect"}

    running = asyncio.ensure_future(app(scope, receive, sent.put))
    running.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        is_over = False
        while not is_over:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            is_over = messages[-1] is None
            if found := [message for message in messages if message is not None]:
                yield found
    finally:
        closed.set()
        _running_tasks.add(running)  # runs to its end: it is notified, not cancelled
        running.add_done_callback(_running_tasks.discard)
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # already logged


_running_tasks: set[asyncio.Future[None]] = set()


def load_error(message: str) -> Exception:
    """The error of a replica, extracted from Ray's message, which holds tracebacks of several processes."""
    if (found := re.search(rf"{LOAD_ERROR}(\[.*\])", message)) is None:
        return RuntimeError(message.strip().rsplit("\n", 1)[-1])
    name, words = json.loads(found[1])
    kind = getattr(errors, name, None)
    return kind(words) if kind is not None else RuntimeError(f"{name}: {words}")
