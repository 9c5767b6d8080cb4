"""The front of several replicas: who comes in, what needs no model, and the way of a request to a replica and back.

It is the application of one server (`application`), with the same doorman, and holds no model: once a request is let in
and its body is there, it goes to a replica as it is, unread, and what the replica sends is sent on at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

from fastapi import APIRouter, FastAPI
from prometheus_client.core import Metric
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve import openai, plain
from blip2.serve.app import application
from blip2.serve.bodies import Bodies
from blip2.serve.doorman import END, HEADERS
from blip2.serve.errors import ApiError, as_api_error, still_loading
from blip2.serve.hosts import Door
from blip2.serve.house import House
from blip2.serve.limits import Limits
from blip2.serve.log import current_id
from blip2.serve.metrics import Metrics, text_of
from blip2.serve.places import Places, too_late
from blip2.serve.replica import Tidy
from blip2.serve.service import Service

NAME = "front"
"""What its numbers are labelled with, where a replica's carry the replica's name."""
COUNTED_HERE = ("blip2_request_seconds", "blip2_requests_in_house", "blip2_connections", "blip2_body_bytes")
"""Each request passes this door and its replica's, and is counted once."""
SHOWN = (*COUNTED_HERE, "blip2_requests_rejected")
"""The other numbers are of models, and none are here."""
WATCH_S = 0.5
"""So often is it looked whether replicas are running."""
NUMBERS_S = 2.0
"""So long are the replicas' numbers waited for."""
GRACE_S = 2.0
"""A replica says itself that the time is up; one that does not even do that is given up."""
CARRIED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client")
"""What a replica is told of a request, besides its headers and what our own middleware has put into its scope."""


class ReplicaDied(Exception):
    """The replica that was answering is gone."""


class Replicas(Protocol):
    """Where the models are. `start`, `num_running` are called in a thread, the others on the event loop."""

    def start(self, stopped: threading.Event) -> bool:
        """Whether all have loaded; False: ``stopped`` was set before. Raises what kept a model from being loaded."""

    def num_running(self) -> int: ...

    def answer(self, scope: Scope, left_s: float, body: list[bytes]) -> AsyncGenerator[list[Message], None]:
        """The messages of one answer, as they come. Closed early, it ends the work. Raises ReplicaDied.

        ``body``: one, which is taken out of the list, so that it is not held longer than needed.
        """

    async def families(self) -> list[list[Metric]]:
        """The numbers of each that answers."""


class Front:
    """What `application` needs of a `Service`, where the models are elsewhere.

    ``on_open`` is called, in a thread, once every replica has loaded.
    """

    def __init__(
        self, replicas: Replicas, limits: Limits, num_replicas: int, on_open: Callable[[], None] = lambda: None
    ) -> None:
        self.replicas = replicas
        self.limits = replace(limits, max_queue=limits.max_queue * num_replicas)
        self.metrics = Metrics(NAME)
        self.house = House(limits.max_connections, self.metrics.refuse)
        self.places = Places(self.limits)
        self.bodies = Bodies(self.limits)
        self.metrics.follow_connections(self.house.count)
        self.metrics.body_bytes.set_function(lambda: self.bodies.num_bytes)
        self.death = None
        self.end_s: float | None = None
        """When everything has to be over (monotonic), once the process is asked to end."""
        self.load_error: BaseException | None = None
        self.is_stopping = False
        self.tidy = Tidy()
        self._on_open = on_open
        self._num_running: int | None = None
        self._start_s = time.monotonic()
        self._stopped = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="blip2 replicas", daemon=True)

    def start(self) -> None:
        self._watching.start()

    def _watch(self) -> None:
        try:
            if not self.replicas.start(self._stopped):
                return
            self._num_running = self.replicas.num_running()
            self._on_open()
        except BaseException as error:  # told by /ready, and by whoever runs the server
            self.load_error = error
            return
        while not self._stopped.wait(WATCH_S):
            self.tidy.look()
            try:
                self._num_running = self.replicas.num_running()
            except Exception:  # who watches them is being started anew itself
                self._num_running = 0

    async def stop(self) -> None:
        self.is_stopping = True
        self._stopped.set()
        await asyncio.to_thread(self._watching.join)

    def end_requests(self) -> None:
        """Whoever still waits for an answer is told now that there will be none."""
        self.is_stopping = True
        stopping = ApiError(503, "stopping", "the server is stopping; send it again", headers={"Retry-After": "2"})
        self.bodies.end_all(stopping)
        self.places.end_all(stopping)

    def refusal(self) -> ApiError | None:
        """Why nothing can be answered at present; None: it can."""
        if self.load_error is not None:
            return ApiError(503, "model_failed", "the model cannot be loaded; the server says why where it was started")
        if self.is_stopping:
            return ApiError(503, "stopping", "the server is stopping")
        if self._num_running is None:
            return still_loading(self._start_s)
        if not self._num_running:
            return ApiError(
                503, "no_replica", "no replica is running; one is being started, try again",
                headers={"Retry-After": "2"},
            )  # fmt: skip
        return None

    async def numbers(self) -> bytes:
        """For /metrics: of all replicas that answer, and of this door."""
        families = [family for family in self.metrics.families() if family.name in SHOWN]
        with suppress(Exception):  # one that hangs, or dies just now; Ray will tell
            async with asyncio.timeout(NUMBERS_S):
                for of_one in await self.replicas.families():
                    families += [family for family in of_one if family.name not in COUNTED_HERE]
        return text_of(families)


def create_front(front: Front, *, keys: Sequence[str] = (), door: Door | None = None) -> FastAPI:
    """The application of one server, whose requests for a model go to the replicas."""
    # The routes are for the description, and to tell what there is; none of them is run here.
    routers = [openai.router(cast(Service, front)), plain.router(cast(Service, front))]
    app = application(front, routers, keys=keys, door=door)
    app.user_middleware.append(Middleware(_Forward, front=front, routers=routers))  # the innermost
    return app


class _Forward:
    """ASGI middleware: what needs a model is answered by a replica."""

    def __init__(self, app: ASGIApp, *, front: Front, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._front = front
        self._routes: list[BaseRoute] = [route for router in routers for route in router.routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not any(route.matches(scope)[0] is Match.FULL for route in self._routes):
            await self._app(scope, receive, send)
            return
        if (refusal := self._front.refusal()) is not None:
            raise refusal
        body = await _whole(receive)
        if body is not None:
            self._front.tidy.note(len(body[0]))
            await _Passage(self._front, scope, receive, send).answer(body)


class _Passage:
    """One request, on its way to a replica and back."""

    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        self._front = front
        self._scope = scope
        self._receive = receive
        self._send = send
        self._is_complete = False

    async def answer(self, body: list[bytes]) -> None:
        left_s = self._scope.get(END, time.monotonic() + self._front.limits.deadline_s) - time.monotonic()
        passing = asyncio.ensure_future(self._pass_on(left_s, body))
        leaving = asyncio.ensure_future(_left(self._receive))
        error: ApiError | None = None
        try:
            await asyncio.wait((passing, leaving), timeout=left_s + GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                error = _error_of(passing)
            elif not leaving.done():
                error = too_late()
        finally:
            passing.cancel()
            leaving.cancel()
            await asyncio.wait((passing, leaving))
        if error is not None and not self._is_complete:
            raise error  # the doorman knows how far the answer has come

    async def _pass_on(self, left_s: float, body: list[bytes]) -> None:
        answer = self._front.replicas.answer(_carried(self._scope), left_s, body)
        try:
            async for messages in answer:
                for message in messages:
                    await self._pass_on_one(message)
        finally:
            await answer.aclose()
        if not self._is_complete:
            raise ReplicaDied

    async def _pass_on_one(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # The replica's doorman has put these as ours will.
            headers = [header for header in message["headers"] if header not in HEADERS]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        await self._send(message)


def _error_of(passing: asyncio.Future[None]) -> ApiError | None:
    if passing.cancelled():  # not by us: Ray tells so of a replica that is ended
        return _died()
    error = passing.exception()
    return None if error is None else _died() if isinstance(error, ReplicaDied) else as_api_error(error)


def _died() -> ApiError:
    return ApiError(
        503, "replica_died", "the replica that was to answer has died; send the request again",
        headers={"Retry-After": "1"},
    )  # fmt: skip


def _carried(scope: Scope) -> dict[str, Any]:
    """Of a request's scope what can travel; not the key, which has been looked at. Its name in the log is ours."""
    ours = {key: value for key, value in scope.items() if key.startswith("blip2.") and isinstance(value, (str, bytes))}
    headers = [each for each in scope["headers"] if each[0] not in (b"authorization", b"x-request-id")]
    headers.append((b"x-request-id", current_id.get().encode()))
    return {**{key: scope[key] for key in CARRIED if key in scope}, **ours, "headers": headers}


async def _whole(receive: Receive) -> list[bytes] | None:
    """The body, which the doorman has read already; None: nobody is there any more."""
    parts: list[bytes] = []
    is_over = False
    while not is_over:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        is_over = not message.get("more_body", False)
    return parts if len(parts) == 1 else [b"".join(parts)]


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
