"""Who comes in: the key, the size of what they carry, a place in the queue. Before anything of it is understood."""

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
from blip2.serve.errors import ApiError
from blip2.serve.house import origin_of
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.places import Places
from blip2.serve.tidy import Tidy

OPEN_PATHS = ("/", "/health", "/ready")
"""The page and what load balancers ask; these need no key."""
OPEN_FOLDER = "/page/"
"""The page's own files; it is the page that asks for the key."""
END = "blip2.end_s"
"""Where the scope has the moment (monotonic) at which the answer has to be there."""
CLIENT = "blip2.client"
"""Where the scope has who asks, for turns between clients: a short digest of the key, else `house.origin_of` the
address."""
LET_GO = "blip2.let_go"
"""Where the scope has what a route calls (without arguments) when it needs the body no longer."""
REFUSED = "blip2.refused"
"""Where the scope has the `ApiError` of a request that was refused before it came here; it is sent away from here."""
ANSWERED = "blip2.answered"
"""Where the scope has the response to a request that needs nobody behind the `Gate`; likewise."""
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
    ``replica``: sent with each answer. ``places``, ``bodies``: to be given where somebody else has to know of them.
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
        self._salt = secrets.token_bytes(16)  # a name that is written down must not help to guess the key
        self._tidy = Tidy()
        metrics.in_house.set_function(lambda: len(self._places))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        status = 499  # hung up before there was an answer
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

        lingers = scope["method"] != "POST" and self._has_body(scope)  # which no route reads
        answer = _unfinished(noted_send) if lingers else noted_send
        try:
            await self._let_in(scope, receive, answer)
        except ApiError as error:
            self._metrics.refuse(error.code)
            response = error.response()
            if is_events and not is_whole:  # the status was sent long ago
                event = f"data: {json.dumps(error.body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
                await noted_send({"type": "http.response.body", "body": event, "more_body": False})
            elif status != 499:
                pass  # half of an answer is there: the connection ends, and nobody takes it for a whole one
            elif scope["method"] == "POST" and END not in scope and error.code != "stopping":
                response.headers["connection"] = "close"  # what was to come of the request is not waited for
                lingers = True
                await response(scope, receive, _unfinished(noted_send))
            else:
                await response(scope, receive, answer)
        finally:
            path = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.request_seconds.labels(path, str(status)).observe(time.monotonic() - began_s)
            if scope["method"] == "POST":
                self._tidy.note()
        if lingers:
            await self._discard(receive, scope.get(CLIENT, ""))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (refused := scope.get(REFUSED)) is not None:
            raise refused
        if (response := scope.get(ANSWERED)) is not None:
            await response(scope, receive, send)
            return
        is_open = scope["path"] in OPEN_PATHS or (scope["method"] == "GET" and scope["path"].startswith(OPEN_FOLDER))
        key = self._key(scope) if self._keys else None
        if self._keys and not is_open and key is None:
            raise ApiError(
                401, "invalid_api_key", "this server asks for a key: send the header 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        client = scope.setdefault(CLIENT, self._client(scope, key))  # or as the front of replicas says
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal()) is not None:
            raise refusal
        self._places.check(client)  # before anything is read of it
        body = self._bodies.begin(client)
        try:
            if not await body.receive(scope, receive, self._limits):
                return  # nobody is there any more
            scope.setdefault(END, time.monotonic() + self._limits.deadline_s)  # or as the front of replicas says
            scope[LET_GO] = body.let_go
            async with self._places.taken(client, scope[END]):
                await self._app(scope, body.replay(receive), send)
        finally:
            body.let_go()

    def _client(self, scope: Scope, key: bytes | None) -> str:
        if key is not None:
            return hashlib.blake2b(key, key=self._salt, digest_size=6).hexdigest()
        return origin_of(scope["client"][0] if scope.get("client") else None)

    def _has_key(self, scope: Scope) -> bool:
        return self._key(scope) is not None

    def _key(self, scope: Scope) -> bytes | None:
        """The key that was sent, if it is one of ours."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        given = values[0].strip() if values else b""
        scheme, _, key = given.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        # All are compared, in a time that does not tell how far any of them agrees.
        return key if sum([hmac.compare_digest(key, known) for known in self._keys]) > 0 else None

    def _has_body(self, scope: Scope) -> bool:
        """One that may be as large as it says."""
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"").strip()[:19]
        is_bounded = declared.isdigit() and 0 < int(declared) <= self._limits.max_body_bytes
        return b"transfer-encoding" in headers or is_bounded

    async def _discard(self, receive: Receive, client: str) -> None:
        """The rest of a request that is answered already, for a while.

        To close a connection on which something is unread is to reset it, and a client that is still sending would
        never see the answer.
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
    """Sends all of a response, and leaves the connection open."""

    async def send_on(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    return send_on
