"""The front process of several replicas: admission, routes without a model, and forwarding to a replica.

It runs the application of a single server (`application`) with the same admission, but without a model. An admitted
request with its complete body is forwarded to a replica unparsed, and the replica's answer is streamed back.
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
from blip2.serve.admission import END, HEADERS
from blip2.serve.app import application
from blip2.serve.bodies import Bodies
from blip2.serve.connections import Connections
from blip2.serve.errors import ApiError, as_api_error
from blip2.serve.hosts import Door
from blip2.serve.limits import Limits
from blip2.serve.loading import Loading
from blip2.serve.log import current_id
from blip2.serve.metrics import Metrics, text_of
from blip2.serve.places import Places, too_late
from blip2.serve.replica import MemoryTrimmer
from blip2.serve.service import Service

NAME = "front"
"""The label of its own metrics, where those of a replica carry the replica's name."""
COUNTED_HERE = ("blip2_request_seconds", "blip2_requests_in_house", "blip2_connections", "blip2_body_bytes")
"""Metrics that replicas have as well; only these are reported, so that each request is counted once."""
SHOWN = (*COUNTED_HERE, "blip2_requests_rejected")
"""Metrics of the front process; all others are about models, and none are here."""
WATCH_S = 0.5
"""Seconds between checks whether replicas are running."""
NUMBERS_S = 2.0
"""Seconds to wait for the replicas' metrics."""
GRACE_S = 2.0
"""Seconds after the deadline at which a replica that does not report it is given up."""
CARRIED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client")
"""Scope entries sent to a replica beside the headers and those of our own middleware."""


class ReplicaDied(Exception):
    """The replica that was answering has died."""


class Replicas(Protocol):
    """The replicas. `start` and `num_running` are called in a thread, the others on the event loop."""

    def start(self, stopped: threading.Event) -> bool:
        """True once all have loaded. False: ``stopped`` was set before. Raises the error that kept a model from
        loading."""

    def num_running(self) -> int: ...

    def answer(self, scope: Scope, left_s: float, body: list[bytes]) -> AsyncGenerator[list[Message], None]:
        """The messages of one answer, as they arrive. Closing it early cancels the work. Raises ReplicaDied.

        ``body``: a list of one item, which is removed from it, so that its memory is released early.
        """

    async def families(self) -> list[list[Metric]]:
        """The metrics of each replica that answers."""


class Front:
    """The counterpart of `Service` for `application`, with the models in replicas.

    ``on_open`` is called in a thread once every replica has loaded.
    """

    def __init__(
        self, replicas: Replicas, limits: Limits, num_replicas: int, on_open: Callable[[], None] = lambda: None
    ) -> None:
        self.replicas = replicas
        self.limits = replace(limits, max_queue=limits.max_queue * num_replicas)
        self.metrics = Metrics(NAME)
        self.connections = Connections(limits.max_connections, self.metrics.refuse)
        self.places = Places(self.limits)
        self.bodies = Bodies(self.limits)
        self.metrics.follow_connections(self.connections.count)
        self.metrics.body_bytes.set_function(lambda: self.bodies.num_bytes)
        self.death = None
        self.end_s: float | None = None
        """The time (monotonic) by which everything has to end, once the process was asked to stop."""
        self.load_error: BaseException | None = None
        self.is_stopping = False
        self.trimmer = MemoryTrimmer()
        self._on_open = on_open
        self._num_running: int | None = None
        self._loading = Loading()
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
        except BaseException as error:  # reported by /ready and by `run`
            self.load_error = error
            return
        while not self._stopped.wait(WATCH_S):
            self.trimmer.look()
            try:
                self._num_running = self.replicas.num_running()
            except Exception:  # Ray's controller itself is restarting
                self._num_running = 0

    async def stop(self) -> None:
        self.is_stopping = True
        self._stopped.set()
        await asyncio.to_thread(self._watching.join)

    def end_requests(self) -> None:
        """End all waiting requests with an error."""
        self.is_stopping = True
        stopping = ApiError(503, "stopping", "the server is stopping; send it again", headers={"Retry-After": "2"})
        self.bodies.end_all(stopping)
        self.places.end_all(stopping)

    def refusal(self) -> ApiError | None:
        """Why nothing can be answered at present, or None."""
        if self.load_error is not None:
            return ApiError(503, "model_failed", "the model cannot be loaded; see the server's output")
        if self.is_stopping:
            return ApiError(503, "stopping", "the server is stopping")
        if self._num_running is None:
            return self._loading.refusal()
        if not self._num_running:
            return ApiError(
                503, "no_replica", "no replica is running; one is starting, try again",
                headers={"Retry-After": "2"},
            )  # fmt: skip
        return None

    async def numbers(self) -> bytes:
        """The text for /metrics: of all replicas that answer, and of this process."""
        families = [family for family in self.metrics.families() if family.name in SHOWN]
        with suppress(Exception):  # a replica that hangs or is dying; Ray will report it
            async with asyncio.timeout(NUMBERS_S):
                for of_one in await self.replicas.families():
                    families += [family for family in of_one if family.name not in COUNTED_HERE]
        return text_of(families)


def create_front(front: Front, *, keys: Sequence[str] = (), door: Door | None = None) -> FastAPI:
    """The application of a single server, which forwards requests for a model to the replicas."""
    # The routes are only needed for /openapi.json and 404 messages; none of them runs here.
    routers = [openai.router(cast(Service, front)), plain.router(cast(Service, front))]
    app = application(front, routers, keys=keys, door=door)
    app.user_middleware.append(Middleware(_Forward, front=front, routers=routers))  # the innermost
    return app


class _Forward:
    """ASGI middleware: forwards requests that need a model to a replica."""

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
            self._front.trimmer.note(len(body[0]))
            await _ForwardedRequest(self._front, scope, receive, send).answer(body)


class _ForwardedRequest:
    """One request, forwarded to a replica, and its answer."""

    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        self._front = front
        self._scope = scope
        self._receive = receive
        self._send = send
        self._is_complete = False

    async def answer(self, body: list[bytes]) -> None:
        left_s = self._scope.get(END, time.monotonic() + self._front.limits.deadline_s) - time.monotonic()
        forwarding = asyncio.ensure_future(self._forward(left_s, body))
        leaving = asyncio.ensure_future(_left(self._receive))
        error: ApiError | None = None
        try:
            await asyncio.wait((forwarding, leaving), timeout=left_s + GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            if forwarding.done():
                error = _error_of(forwarding)
            elif not leaving.done():
                error = too_late()
        finally:
            forwarding.cancel()
            leaving.cancel()
            await asyncio.wait((forwarding, leaving))
        if error is not None and not self._is_complete:
            raise error  # `Admission` knows how much of the answer was sent

    async def _forward(self, left_s: float, body: list[bytes]) -> None:
        answer = self._front.replicas.answer(_carried(self._scope), left_s, body)
        try:
            async for messages in answer:
                for message in messages:
                    await self._forward_message(message)
        finally:
            await answer.aclose()
        if not self._is_complete:
            raise ReplicaDied

    async def _forward_message(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # Headers of the replica's `Admission`; ours sets them again.
            headers = [header for header in message["headers"] if header not in HEADERS]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        await self._send(message)


def _error_of(forwarding: asyncio.Future[None]) -> ApiError | None:
    if forwarding.cancelled():  # not by us: Ray's sign that the replica has ended
        return _died()
    error = forwarding.exception()
    return None if error is None else _died() if isinstance(error, ReplicaDied) else as_api_error(error)


def _died() -> ApiError:
    return ApiError(
        503, "replica_died", "the replica died; send the request again",
        headers={"Retry-After": "1"},
    )  # fmt: skip


def _carried(scope: Scope) -> dict[str, Any]:
    """The entries of a request's scope that can be sent, without the API key. The request id is kept."""
    ours = {key: value for key, value in scope.items() if key.startswith("blip2.") and isinstance(value, (str, bytes))}
    headers = [each for each in scope["headers"] if each[0] not in (b"authorization", b"x-request-id")]
    headers.append((b"x-request-id", current_id.get().encode()))
    return {**{key: scope[key] for key in CARRIED if key in scope}, **ours, "headers": headers}


async def _whole(receive: Receive) -> list[bytes] | None:
    """The body, which `Admission` has received already; None: the client disconnected."""
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
