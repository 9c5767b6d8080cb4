"""A connection that nobody can hold, or fill, by sending or reading almost nothing: what uvicorn itself leaves open."""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 2**16
"""Received without a request, or a part of its body, coming of it: a head, trailers, the frames of chunks."""
MAX_PIPELINED = 16
"""Requests sent on one connection before the first of them is answered."""
MIN_READ_BYTES = 4096
"""So many bytes of a waiting answer have to be taken in ``stall_s``."""


class Connection(HttpToolsProtocol):
    """The head of a request has ``head_s`` seconds, an answer that nobody reads ``stall_s``."""

    head_s = 10.0
    stall_s = 20.0

    _num_fruitless = 0
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _num_unread = 0
    _unanswered: tuple[RequestResponseCycle, ...] = ()

    # ---- what comes ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head()
        self._num_fruitless += len(data)
        super().data_received(data)
        if self._num_fruitless > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests at once")
        self._num_fruitless = 0
        _cancel(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()
        self._unanswered = *(each for each in self._unanswered if not each.response_complete), self.cycle

    def on_body(self, body: bytes) -> None:
        self._num_fruitless = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer)
        _cancel(self._stall_timer)
        super().connection_lost(exc)
        for cycle in self._unanswered:  # uvicorn tells the last of several only, so that others would be written on
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)

    # ---- what goes ----

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            _cancel(self._stall_timer)
            self._stall_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def _expect_reading(self) -> None:
        """What waits to be read has to become less, else the connection would stay for ever, closed or not."""
        if self._stall_timer is None:
            self._num_unread = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(self.stall_s, self._check_reading)

    def _check_reading(self) -> None:
        self._stall_timer = None
        if self._num_unread - self.transport.get_write_buffer_size() < MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._expect_reading()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
