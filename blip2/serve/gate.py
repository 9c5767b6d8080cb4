"""The outermost middleware: HEAD and OPTIONS on every route, CORS, and a proxy's path prefix."""

from __future__ import annotations

import re

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve.admission import ANSWERED, REFUSED
from blip2.serve.errors import ApiError
from blip2.serve.hosts import ANY, Door, Hosts, is_address
from blip2.serve.routes import Routes

EXPOSED = b", ".join(
    (
        b"x-request-id", b"x-blip2-replica", b"x-blip2-forgotten-turns", b"x-blip2-ignored",
        b"x-blip2-loading-seconds", b"x-blip2-loading-percent", b"retry-after",
    )
)  # fmt: skip
"""Response headers that a page of an allowed origin may read."""
PREFLIGHT_S = b"600"
"""Seconds for which a browser may cache a preflight answer."""
HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,2000}")
POLICY = b"cross-origin-resource-policy"


class Gate:
    """ASGI middleware around the `Admission`, which sends the refusals decided here."""

    def __init__(self, app: ASGIApp, *, door: Door, routes: Routes, has_keys: bool) -> None:
        self._app = app
        self._hosts = Hosts(door, has_keys=has_keys)
        self._has_origins = bool(door.cors_origins)
        self._is_for_any = ANY in door.cors_origins
        self._root_path = door.root_path
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _name_client(scope)
        is_folder_missing = self._take_off_root_path(scope)
        origin = self._allowed_origin(scope)
        if self._has_origins:
            send = self._with_cors(send, origin)
        refusal = self._hosts.refusal(scope)
        if refusal is not None:
            await self._app({**scope, REFUSED: refusal}, receive, send)
        elif scope["method"] == "OPTIONS":
            await self._app({**scope, ANSWERED: self._options(scope, origin is not None)}, receive, send)
        elif is_folder_missing and scope["method"] in ("GET", "HEAD"):
            # Without the slash the page's relative URLs would resolve beside the prefix, not below it.
            moved = Response(status_code=308, headers={"Location": f"{self._root_path}/"})
            await self._app({**scope, ANSWERED: moved}, receive, send)
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self._app(scope, receive, send)

    def _take_off_root_path(self, scope: Scope) -> bool:
        """Removes the prefix from the scope's path. True if the path was only the prefix."""
        path, prefix = scope["path"], self._root_path
        if not prefix:
            return False
        if path != prefix and not path.startswith(f"{prefix}/"):
            return False  # the proxy removed it
        scope["path"] = path[len(prefix) :] or "/"
        if (raw := scope.get("raw_path")) is not None:
            scope["raw_path"] = raw.removeprefix(prefix.encode()) or b"/"
        return bool(path == prefix)

    # ---- CORS ----

    def _allowed_origin(self, scope: Scope) -> bytes | None:
        if not self._has_origins:
            return None
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        return origins[0] if len(origins) == 1 and self._hosts.allows_origin(origins[0]) else None

    def _with_cors(self, send: Send, origin: bytes | None) -> Send:
        added = [(b"vary", b"Origin")]
        if origin is not None:
            added += [
                (b"access-control-allow-origin", b"*" if self._is_for_any else origin),
                (b"access-control-expose-headers", EXPOSED),
                (POLICY, b"cross-origin"),
            ]

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [each for each in message.get("headers", ()) if origin is None or each[0].lower() != POLICY]
                message = {**message, "headers": [*kept, *added]}
            await send(message)

        return send_on

    def _options(self, scope: Scope, is_allowed: bool) -> Response:
        """The allowed methods of a path, without a key: browsers send none with a preflight."""
        asked = {name: value for name, value in scope["headers"] if name.startswith(b"access-control-request-")}
        is_preflight = b"access-control-request-method" in asked
        allowed = self._routes.allowed(scope["path"])
        if scope["path"] == "*" or (is_preflight and is_allowed):
            # An unknown path is reported by the request itself, whose answer a page can read.
            allowed = allowed or "GET, HEAD, OPTIONS, POST"
        if allowed is None:
            return ApiError(404, "not_found", "Not Found").response()
        response = Response(status_code=204, headers={"Allow": allowed})
        if is_preflight and is_allowed:
            wanted = asked.get(b"access-control-request-headers", b"")
            names = wanted if HEADER_NAMES.fullmatch(wanted) else b"authorization, content-type"
            response.raw_headers += [
                (b"access-control-allow-methods", b"GET, HEAD, OPTIONS, POST"),
                (b"access-control-allow-headers", names),
                (b"access-control-max-age", PREFLIGHT_S),
            ]
            if asked.get(b"access-control-request-private-network") == b"true":
                response.raw_headers.append((b"access-control-allow-private-network", b"true"))
        return response


def _name_client(scope: Scope) -> None:
    """On a Unix socket there is no client address except the last entry of X-Forwarded-For, which the proxy adds and no
    client can forge."""
    if scope.get("client") is None:
        given = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        address = given[-1].decode("latin-1").rpartition(",")[2].strip() if given else ""
        if is_address(address):
            scope["client"] = (address, 0)


def _without_body(send: Send) -> Send:
    async def send_on(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_on
