"""A connection that cannot be blocked or filled by slow clients: the limits that uvicorn lacks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from blip2.serve.connections import STATE, Activity, Connections, Lane, origin_of
from blip2.serve.errors import ApiError

MAX_HEAD_BYTES = 2**16
"""Maximum bytes received without starting a request or part of a body: heads, trailers, chunk headers."""
FRAME_BYTES = 16
"""Maximum framing bytes per byte of a body; chunks of a single byte need less."""
MAX_HEADERS = 200
"""Maximum headers of a request, trailers included: each takes far more memory than bytes on the wire."""
MAX_PIPELINED = 8
"""Maximum requests pipelined on one connection before the first is answered."""
WATCHED = ("/health", "/ready")
MIN_READ_BYTES = 4096
"""Bytes of a pending answer that the client has to read within ``stall_s``."""


class Connection(HttpToolsProtocol):
    """A request's head has to arrive within ``head_s`` seconds, and an answer has to be read within ``stall_s``.

    If there are too many connections, an idle one is closed, see `Connections`.
    """

    head_s = 10.0
    stall_s = 20.0

    _num_fruitless = 0
    _is_begun = False
    _is_lost = False
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _num_unread = 0
    _unanswered: tuple[RequestResponseCycle, ...] = ()

    # ---- receiving ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connections: Connections = self.app_state.setdefault(STATE, Connections())
        self.origin = origin_of(self.client[0] if self.client else None)
        self.since_s = self.loop.time()
        self._connections.add(self)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head()
        self._num_fruitless += len(data)
        super().data_received(data)
        if self._num_fruitless > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
                self._end("body_after_answer")
                return
            self._refuse(431, "head_too_large", "the head of the request is too large; send fewer or shorter headers")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(431, "too_many_headers", f"the request has more than {MAX_HEADERS} headers; send fewer")
            raise httptools.HttpParserError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(400, "too_many_requests_at_once", "wait for answers before sending more requests")
            raise httptools.HttpParserError("too many requests at once")
        self._num_fruitless = 0
        _cancel(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()
        self._unanswered = *(each for each in self._unanswered if not each.response_complete), self.cycle

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        def begin() -> None:
            if not cycle.disconnected:
                self._is_begun = True
                super(Connection, self)._start_asgi_task(cycle, app)

        self._is_begun = False
        lane = Lane.EXPRESS if cycle.scope["path"].endswith(WATCHED) else Lane.FRESH
        self._connections.starts.add(self.loop, begin, Lane.AHEAD if cycle in self._unanswered else lane)

    def on_body(self, body: bytes) -> None:
        if not self.cycle.response_complete:  # else it is not needed any more
            self._num_fruitless = max(self._num_fruitless - FRAME_BYTES * len(body), 0)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():  # else the error was sent already
            self._refuse(400, "bad_request", "this is not an HTTP request; send HTTP/1.1")

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        self._is_lost = True
        _cancel(self._head_timer)
        _cancel(self._stall_timer)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for cycle in self._unanswered:  # uvicorn only tells the last of several, so the others would go on
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        # Break reference cycles, which would stay until the garbage collector runs.
        for cycle, _ in self.pipeline:
            cycle.on_response = lambda: None
        self.pipeline.clear()
        self._unanswered = ()
        self.cycle = None  # type: ignore[assignment]

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self._end, "head_timeout")

    # ---- its state, for `Connections` ----

    @property
    def activity(self) -> Activity:
        waiting = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if self.flow.write_paused or (not waiting and self.transport.get_write_buffer_size()):
            return Activity.UNREAD
        if waiting:  # they are answered in order
            return Activity.WORK if self._is_begun and not waiting[0].more_body else Activity.BODY
        return Activity.IDLE if self._head_timer is None else Activity.SILENT

    def evict(self) -> None:
        self.transport.abort()

    def _end(self, reason: str) -> None:
        self._connections.refuse(reason)
        self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer something that is not a valid request, then close the connection."""
        self._connections.refuse(code)
        if any(not cycle.response_complete for cycle in self._unanswered):  # do not write into an answer
            self.transport.close()
            return
        body = json.dumps(ApiError(status, code, message).body).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    # ---- sending ----

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            _cancel(self._stall_timer)
            self._stall_timer = None

    def on_response_complete(self) -> None:
        self.since_s = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def _expect_reading(self) -> None:
        """The send buffer has to shrink within ``stall_s``, else the connection would stay open for ever."""
        if self._stall_timer is None and not self._is_lost:
            self._num_unread = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(self.stall_s, self._check_reading)

    def _check_reading(self) -> None:
        self._stall_timer = None
        if self._num_unread - self.transport.get_write_buffer_size() < MIN_READ_BYTES:
            self._end("answer_unread")
        else:
            self._expect_reading()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
