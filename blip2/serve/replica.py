"""One of several replicas, as Ray Serve makes it: an application that gets requests, and gives answers, by calls.

It lives as behind any server (its queue and limits are its own), but for the door: who may come in was asked before.
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
from blip2.checkpoint.reader import give_back_memory
from blip2.serve.doorman import END
from blip2.serve.service import Models
from blip2.serve.tidy import share_one_arena

LOAD_ERROR = "blip2 was not loaded: "
DEATH_S = 0.2
"""So often a replica looks whether its model is still alive."""
TIDY_BYTES, TIDY_S = 2**25, 20.0
"""After so many bytes of bodies, but only so often, is freed memory given back."""

Create = Callable[[Callable[[], Models], str], FastAPI]


class Tidy:
    """Gives freed memory back to the system: the C library would keep what the pieces of large bodies leave behind."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._last_s = time.monotonic()

    def note(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes

    def look(self) -> None:
        """To be called now and then, in a thread."""
        if self._num_bytes >= TIDY_BYTES and time.monotonic() - self._last_s > TIDY_S:
            self._num_bytes, self._last_s = 0, time.monotonic()
            give_back_memory()


def replica_of(serve: Any, load: Callable[[], Models], create: Create) -> type:
    """The class that Ray makes its replicas of."""

    class Replica:
        app: FastAPI

        def __init__(self) -> None:
            share_one_arena()
            # Models first, so that nobody is sent here before they are there, and their error ends the start.
            try:
                models = load()
            except Exception as error:
                raise RuntimeError(LOAD_ERROR + json.dumps([type(error).__name__, str(error)])) from error
            self.app = create(lambda: models, serve.get_replica_context().replica_id.unique_id)
            self._tidy = Tidy()
            self._ended = asyncio.Event()
            self._living: asyncio.Task[None] | None = asyncio.create_task(self._live())

        async def _live(self) -> None:
            async with self.app.router.lifespan_context(self.app):
                watch = asyncio.create_task(self._die_with_the_model())
                await self._ended.wait()
                watch.cancel()

        def __del__(self) -> Coroutine[Any, Any, Any] | None:
            """Ray calls it when a replica is to end, and awaits what it gives."""
            living, self._living = getattr(self, "_living", None), None
            if living is None:
                return None
            self._ended.set()
            return asyncio.wait((living,))

        async def check_health(self) -> None:
            """Ray asks before the first request and then every few seconds; an error, and it starts a new replica."""
            service = self.app.state.service
            while (refusal := service.refusal()) is not None and refusal.code == "loading":
                await asyncio.sleep(0.01)
            if refusal is not None and refusal.code != "stopping":
                raise RuntimeError(refusal.message)

        async def _die_with_the_model(self) -> None:
            """Ray asks several times before it believes that a replica is ill; meanwhile requests would come here."""
            while (refusal := self.app.state.service.refusal()) is None or refusal.code in ("loading", "stopping"):
                await asyncio.sleep(DEATH_S)
                await asyncio.to_thread(self._tidy.look)
            os._exit(1)

        async def answer(self, scope: Scope, left_s: float, *body: bytes) -> AsyncGenerator[bytes, None]:
            """Lists of ASGI messages, pickled: those that the application has sent since the last."""
            scope[END] = time.monotonic() + left_s
            self._tidy.note(sum(map(len, body)))
            async for messages in messages_of(self.app, scope, [b"".join(body)]):
                yield pickle.dumps(messages)

        async def families(self) -> bytes:
            """Its numbers, pickled."""
            return pickle.dumps(self.app.state.service.metrics.families())

    return Replica


async def messages_of(app: Any, scope: Scope, body: list[bytes]) -> AsyncGenerator[list[Message], None]:
    """What an application says to a request. Closed early, it is told that the client has hung up.

    ``body``: is emptied when the application takes it.
    """
    gone = asyncio.Event()
    said: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    running = asyncio.ensure_future(app(scope, receive, said.put))
    running.add_done_callback(lambda _: said.put_nowait(None))
    try:
        is_over = False
        while not is_over:
            messages = [await said.get()]
            while not said.empty():
                messages.append(said.get_nowait())
            is_over = messages[-1] is None
            if found := [message for message in messages if message is not None]:
                yield found
    finally:
        gone.set()
        _at_work.add(running)  # to its end, as behind any server: it is told, and not stopped
        running.add_done_callback(_at_work.discard)
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # told in the log already


_at_work: set[asyncio.Future[None]] = set()


def load_error(message: str) -> Exception:
    """What a replica could not do, out of Ray's account of it, which holds tracebacks of several processes."""
    if (found := re.search(rf"{LOAD_ERROR}(\[.*\])", message)) is None:
        return RuntimeError(message.strip().rsplit("\n", 1)[-1])
    name, words = json.loads(found[1])
    kind = getattr(errors, name, None)
    return kind(words) if kind is not None else RuntimeError(f"{name}: {words}")
