"""Admission: checks the key, receives the body within limits, and takes a place in the queue, before any parsing."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve.bodies import Bodies
from blip2.serve.connections import origin_of
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.places import Places
from blip2.serve.trimmer import MemoryTrimmer

OPEN_PATHS = ("/", "/health", "/ready")
"""The page and the endpoints of load balancers, which need no key."""
OPEN_FOLDER = "/page/"
"""The page's own files; the page asks for the key itself."""
END = "blip2.end_s"
"""Scope key of the deadline (monotonic)."""
CLIENT = "blip2.client"
"""Scope key of the client, for fair turns: a short digest of the API key, else `connections.origin_of` the address."""
RELEASE = "blip2.release"
"""Scope key of the function that a route calls when it no longer needs the body."""
REFUSED = "blip2.refused"
"""Scope key of the `ApiError` of a request that was refused earlier; `Admission` sends it."""
ANSWERED = "blip2.answered"
"""Scope key of the response to a request that needs nothing behind the `Gate`; `Admission` sends it."""
LINGER_S, SILENCE_S = 5.0, 0.5
"""Seconds for which the rest of a refused request is still received, while it keeps arriving."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Admission:
    """ASGI middleware around the whole application.

    ``refusal``: why nothing can be answered at present, or None. ``routes``: the paths that /metrics distinguishes.
    ``replica``: sent with each answer. ``places``, ``bodies``: given if others need to share them.
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
        places: Places | None = None,
        bodies: Bodies | None = None,
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._keys = [key.encode() for key in keys]
        self._refusal = refusal
        self._routes = frozenset(routes)
        self._headers = HEADERS if replica is None else (*HEADERS, (b"x-blip2-replica", replica.encode()))
        self._places = Places(limits) if places is None else places
        self._bodies = Bodies(limits) if bodies is None else bodies
        self._salt = secrets.token_bytes(16)  # client names in the log must not help to guess the key
        self._trimmer = MemoryTrimmer()
        metrics.num_unanswered.set_function(lambda: len(self._places))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        status = 499  # disconnected before the answer
        is_events = is_whole = False

        async def noted_send(message: Message) -> None:
            nonlocal status, is_events, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.get("headers", ())
                is_events = any(value.startswith(b"text/event-stream") for _, value in headers)
                message = {**message, "headers": [*headers, *self._headers]}
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        lingers = scope["method"] != "POST" and self._has_body(scope)  # no route reads it
        answer = _unfinished(noted_send) if lingers else noted_send
        try:
            await self._admit(scope, receive, answer)
        except ApiError as error:
            self._metrics.refuse(error.code)
            response = error.response()
            if is_events and not is_whole:  # the status was already sent
                event = f"data: {json.dumps(error.body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
                await noted_send({"type": "http.response.body", "body": event, "more_body": False})
            elif status != 499:
                pass  # a partial answer was sent: closing the connection marks it as incomplete
            elif scope["method"] == "POST" and END not in scope and error.code != "stopping":
                response.headers["connection"] = "close"  # the rest of the request is not waited for
                lingers = True
                await response(scope, receive, _unfinished(noted_send))
            else:
                await response(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request_seconds.labels(path, str(status)).observe(time.monotonic() - began_s)
            if scope["method"] == "POST":
                self._trimmer.note()
        if lingers:
            await self._discard(receive, scope.get(CLIENT, ""))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (refused := scope.get(REFUSED)) is not None:
            raise refused
        if (response := scope.get(ANSWERED)) is not None:
            await response(scope, receive, send)
            return
        is_open = scope["path"] in OPEN_PATHS or (scope["method"] == "GET" and scope["path"].startswith(OPEN_FOLDER))
        key = self._key(scope) if self._keys else None
        if self._keys and not is_open and key is None:
            raise ApiError(
                401, "invalid_api_key", "this server needs a key: send the header 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        client = scope.setdefault(CLIENT, self._client(scope, key))  # or set by the front process of replicas
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal()) is not None:
            raise refusal
        self._places.check(client)  # before its body is read
        body = self._bodies.begin(client)
        try:
            if not await body.receive(scope, receive, self._limits):
                return  # the client disconnected
            scope.setdefault(END, time.monotonic() + self._limits.deadline_s)  # or set by the front process
            scope[RELEASE] = body.release
            async with self._places.taken(client, scope[END]):
                await self._app(scope, body.replay(receive), send)
        finally:
            body.release()

    def _client(self, scope: Scope, key: bytes | None) -> str:
        if key is not None:
            return hashlib.blake2b(key, key=self._salt, digest_size=6).hexdigest()
        return origin_of(scope["client"][0] if scope.get("client") else None)

    def _has_key(self, scope: Scope) -> bool:
        return self._key(scope) is not None

    def _key(self, scope: Scope) -> bytes | None:
        """The key of the request, if it is a valid one."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        given = values[0].strip() if values else b""
        scheme, _, key = given.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        # Compare with all keys in constant time, so that timing reveals nothing.
        return key if sum([hmac.compare_digest(key, known) for known in self._keys]) > 0 else None

    def _has_body(self, scope: Scope) -> bool:
        """Whether the request has a body that may be as large as it claims."""
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"").strip()[:19]
        is_bounded = declared.isdigit() and 0 < int(declared) <= self._limits.max_body_bytes
        return b"transfer-encoding" in headers or is_bounded

    async def _discard(self, receive: Receive, client: str) -> None:
        """Receive and drop the rest of a request that is already answered, for a limited time.

        Closing a connection with unread data resets it, and a client that is still sending would never see the answer.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                is_over = False
                while not is_over:
                    await self._bodies.turn(client)
                    async with asyncio.timeout(SILENCE_S):
                        message = await receive()
                    is_over = message["type"] == "http.disconnect" or not message.get("more_body", False)


def _unfinished(send: Send) -> Send:
    """Sends the whole response but leaves the connection open."""

    async def send_on(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    return send_on
