"""The server's log: one line per request with its route and status, never its content.

Each request has an id, its ``x-request-id``; every line that it causes begins with it.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve.errors import ApiError, as_api_error
from blip2.serve.routes import Routes

ID = "blip2.id"
"""Scope key of the request id."""
GIVEN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
"""A client's own request id is kept if it matches: it is safe in a header and in a line."""
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT")
POLLED = ("/health", "/ready", "/metrics")
"""Routes polled by machines; logged at debug while all is well, or the model is loading."""
CAPACITY = 2000
"""Lines waiting to be written; further ones are dropped, and their number is logged."""
MAX_LINE = 2000
PAUSE_S = 0.05
"""Seconds to wait for further lines: each run of this thread takes the GIL from the model's thread."""

logger = logging.getLogger("blip2.serve.requests")
current_id: ContextVar[str] = ContextVar("the request's name", default="-")


class RequestLog:
    """ASGI middleware, the outermost: gives each request its id, and logs its line when it is finished."""

    def __init__(self, app: ASGIApp, *, routes: Routes) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        name = scope[ID] = _name(scope)
        current_id.set(name)
        status, num_in, num_out = 499, 0, 0  # disconnected before the answer
        header = (b"x-request-id", name.encode())

        async def counted_receive() -> Message:
            nonlocal num_in
            message = await receive()
            num_in += len(message.get("body", b""))
            return message

        async def noted_send(message: Message) -> None:
            nonlocal status, num_out
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [each for each in message.get("headers", ()) if each[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, header]}
            else:
                num_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, noted_send)
        finally:
            route = self._routes.name(scope["path"])
            level = _level(route, status)
            if logger.isEnabledFor(level):
                method = scope["method"] if scope["method"] in METHODS else "OTHER"
                took_ms = (time.monotonic() - began_s) * 1000
                logger.log(level, "%s %s %d %.0f ms in=%d out=%d", method, route, status, took_ms, num_in, num_out)


def _level(route: str, status: int) -> int:
    if route in POLLED and (status < 400 or status == 503):
        return logging.DEBUG
    return logging.WARNING if status >= 500 and status != 503 else logging.INFO


class Failures:
    """ASGI middleware, the innermost: turns unexpected errors into an answer and log lines."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noted_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        except ApiError:  # `Admission` sends it
            raise
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            response = as_api_error(error).response()
            response.headers["connection"] = "close"  # the next request should use a new connection
            await response(scope, receive, send)


def _name(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and GIVEN_ID.fullmatch(given[0]):
        return given[0].decode()
    return secrets.token_hex(8)


# ---- output ----


class Lines(logging.Formatter):
    """Time, level, request id, message. Every message becomes one line, and tracebacks are indented, so that no client
    can forge a line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname} {current_id.get()} {_plain(record.getMessage())}"
        if not record.exc_info:
            return head
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join([head, *(f"    {_plain(line)}" for line in trace)])


def _plain(text: str) -> str:
    shown = text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else each.encode("unicode_escape", "replace").decode() for each in shown)


class ThreadedHandler(logging.Handler):
    """Writes in a separate thread, so that a pipe that nobody reads does not block the server. Lines that cannot be
    written in time are dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self.setFormatter(Lines())
        self._write_out = _writing(stream)
        self._lines: queue.Queue[str | None] = queue.Queue(CAPACITY)
        self._num_dropped = 0
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._write, name="blip2 log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._num_dropped += 1
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        is_over = False
        while not is_over:
            lines = [self._lines.get()]
            self._is_stopping.wait(PAUSE_S)
            with suppress(queue.Empty):
                while True:
                    lines.append(self._lines.get_nowait())
            is_over = None in lines
            dropped, self._num_dropped = self._num_dropped, 0
            if dropped:
                lines.insert(0, f"({dropped} lines are missing here: they could not be written in time)")
            with suppress(OSError, ValueError):  # closed, or the disk is full: keep serving
                self._write_out("".join(f"{line}\n" for line in lines if line is not None))

    def stop(self) -> None:
        """Write the remaining lines, for at most a second. Not named `close`, which `logging.config` calls at any
        time."""
        self._is_stopping.set()
        with suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(1)


def _writing(stream: TextIO | None) -> Callable[[str], object]:
    """Bypasses Python's buffer if there is a file: a thread blocked in it would keep the process from ending."""
    if stream is None:  # standard error was closed at the start
        return len
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return stream.write

    def write(text: str) -> None:
        rest = text.encode("utf-8", "backslashreplace")
        while rest:
            rest = rest[os.write(number, rest) :]

    return write


@contextmanager
def logging_at(level: str, stream: TextIO | None = None) -> Iterator[None]:
    """Log the server's messages of ``level`` (``info``, ``warning``, ...) and above, and uvicorn's warnings, to
    ``stream`` (standard error)."""
    handler = ThreadedHandler(stream or sys.stderr)
    handler.setLevel(level.upper())
    ours, uvicorns = loggers = logging.getLogger("blip2"), logging.getLogger("uvicorn")
    before = [(each.level, each.propagate) for each in loggers]
    ours.setLevel(level.upper())
    uvicorns.setLevel(max(logging.WARNING, handler.level))
    for each in loggers:
        each.addHandler(handler)
        each.propagate = False
    try:
        yield
    finally:
        for each, (chosen, propagate) in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(chosen)
            each.propagate = propagate
        handler.stop()
