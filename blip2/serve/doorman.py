"""Who comes in: the key, the number of guests, the size of what they carry. Before anything is read of it."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics

OPEN_PATHS = ("/", "/health", "/ready")
"""The page and what load balancers ask; these need no key."""
OPEN_FOLDER = "/page/"
"""The page's own files; it is the page that asks for the key."""
END = "blip2.end_s"
"""Where the scope has the moment (monotonic) at which the answer has to be there."""
CLIENT = "blip2.client"
"""Where the scope has who asks, for those who deal in turns."""
LET_GO = "blip2.let_go"
"""Where the scope has what is to be called when the body is needed no longer."""
REFUSED = "blip2.refused"
"""Where the scope has the `ApiError` of a request that was refused before it came here; it is sent away from here."""
LINGER_S, SILENCE_S = 5.0, 0.5
"""So long is the rest of a refused request still taken, as long as it keeps coming."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Doorman:
    """ASGI middleware around the whole application.

    ``refusal``: why nothing can be answered at present, if so. ``routes``: the paths that /metrics tells apart.
    ``replica``: sent with each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        keys: Sequence[str],
        refusal: Callable[[], ApiError | None],
        routes: Sequence[str],
        replica: str | None = None,
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._keys = [key.encode() for key in keys]
        self._refusal = refusal
        self._routes = frozenset(routes)
        self._headers = HEADERS if replica is None else (*HEADERS, (b"x-blip2-replica", replica.encode()))
        self._num_guests = 0
        metrics.in_house.set_function(lambda: self._num_guests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        status = 499  # hung up before there was an answer
        lingers = False

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        try:
            await self._let_in(scope, receive, noted_send)
        except ApiError as error:
            response = error.response()
            if scope["method"] == "POST":
                response.headers["connection"] = "close"  # what was to come of the request is not waited for
                lingers = True
                await response(scope, receive, _unfinished(noted_send))
            else:
                await response(scope, receive, noted_send)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request_seconds.labels(path, str(status)).observe(time.monotonic() - began_s)
        if lingers:
            await _discard(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (refused := scope.get(REFUSED)) is not None:
            raise self._rejected(refused)
        is_open = scope["path"] in OPEN_PATHS or (scope["method"] == "GET" and scope["path"].startswith(OPEN_FOLDER))
        if self._keys and not is_open and not self._has_key(scope):
            raise self._rejected(
                ApiError(
                    401, "invalid_api_key", "this server asks for a key: send the header 'Authorization: Bearer KEY'",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            )  # fmt: skip
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal()) is not None:
            raise refusal
        if self._num_guests >= self._limits.max_queue:
            raise self._rejected(
                ApiError(
                    429, "queue_full", f"{self._num_guests} requests are in work already; try again in a moment",
                    headers={"Retry-After": "1"},
                )
            )  # fmt: skip
        self._num_guests += 1
        try:
            body = await self._body(scope, receive)
            if body is None:
                return  # nobody is there any more
            scope.setdefault(END, time.monotonic() + self._limits.deadline_s)  # or as the front of replicas says
            await self._app(scope, _again(body, receive), send)
        finally:
            self._num_guests -= 1

    def _has_key(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        given = values[0].strip() if values else b""
        scheme, _, key = given.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        # All are compared, in a time that does not tell how far any of them agrees.
        return sum([hmac.compare_digest(key, known) for known in self._keys]) > 0

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        limit = self._limits.max_body_bytes
        too_large = ApiError(413, "body_too_large", f"the request is larger than {limit:,} bytes; send less at a time")
        declared = [value for name, value in scope["headers"] if name == b"content-length"]
        if declared and declared[0].isdigit() and int(declared[0]) > limit:
            raise self._rejected(too_large)
        content = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    content += message.get("body", b"")
                    if len(content) > limit:
                        raise self._rejected(too_large)
                    if not message.get("more_body", False):
                        return bytes(content)
        except TimeoutError:
            seconds = f"{self._limits.body_s:g} s"
            raise self._rejected(
                ApiError(408, "body_timeout", f"the request did not arrive within {seconds}; send it again")
            ) from None

    def _rejected(self, error: ApiError) -> ApiError:
        self._metrics.requests_rejected.labels(error.code).inc()
        return error


def _unfinished(send: Send) -> Send:
    """Sends all of a response, and leaves the connection open."""

    async def send_on(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    return send_on


async def _discard(receive: Receive) -> None:
    """The rest of a request that is answered already, for a while.

    To close a connection on which something is unread is to reset it, and a client that is still sending would never
    see the answer.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            is_over = False
            while not is_over:
                async with asyncio.timeout(SILENCE_S):
                    message = await receive()
                is_over = message["type"] == "http.disconnect" or not message.get("more_body", False)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more; after it, what the client does (hang up)."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
