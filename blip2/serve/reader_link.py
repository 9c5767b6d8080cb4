"""The server's end of the connection to a reader process (`reader`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from blip2.serve import frames
from blip2.serve.errors import ApiError

PIECE_BYTES = 2**18
MAX_ANSWER_BYTES = 2**26


class Reader(asyncio.Protocol):
    """One process and the connection to it. Each message is answered before the next is sent."""

    def __init__(self, process: int, why_ended: Callable[[Reader], Awaitable[ApiError]]) -> None:
        self.process = process
        self.is_expected = False
        """Whether its request was expected to take long."""
        self.is_slow = False
        self.is_asked = False
        """Whether an answer is pending, so that the reader cannot be reused if that is not awaited."""
        self.is_grown = False
        """Whether to replace the reader after this request."""
        self.new_bytes = 0
        """Its memory in bytes when it was new."""
        self.has_ended = False
        self.began_s = 0.0
        """Processor time at the start of the request, see `processor_s`."""
        self.client = ""
        self.watch: asyncio.TimerHandle
        self.refusal: ApiError | None = None
        """Why we ended it, if we did."""
        self._why_ended = why_ended
        self._received = bytearray()
        self._change: asyncio.Future[None] | None = None
        """Wakes the waiting coroutine: bytes have arrived, the buffer is free, or the reader has ended."""
        self._num_wanted = 0
        self._is_full = False

    async def ask(self, asked: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """Its answer. Raises ApiError for a problem with the request, and if the reader ends: by its time or memory
        limit, a decoder crash, or because it was killed."""
        self.is_asked = True
        try:
            await self._send(frames.packed(asked, len(payload)), payload)
            num_json, num_payload = frames.lengths(await self._take(frames.HEAD.size))
            reply = json.loads(await self._take(num_json))
            content = await self._take(num_payload)
        except (OSError, ValueError) as error:
            raise self.refusal or await self._why_ended(self) from error
        self.is_asked = False
        if "error" in reply:
            status, code, message, param = reply["error"]
            raise ApiError(status, code, message, param=param)
        return reply, content

    async def _send(self, head: bytes, payload: bytes) -> None:
        if len(payload) <= PIECE_BYTES:
            self._transport.write(head + payload)
            return
        self._transport.write(head)
        pieces = memoryview(payload)
        for start in range(0, len(payload), PIECE_BYTES):  # asyncio copies what cannot be sent at once
            self._transport.write(pieces[start : start + PIECE_BYTES])
            while self._is_full:
                await self._changed()

    async def _take(self, number: int) -> bytearray:
        """The next ``number`` bytes."""
        self._num_wanted = number
        while len(self._received) < number:
            await self._changed()
        found = self._received[:number]
        del self._received[:number]
        return found

    async def _changed(self) -> None:
        if self.has_ended:
            raise ConnectionError("the reader has ended")
        self._change = asyncio.get_running_loop().create_future()
        await self._change

    def _wake(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    def close(self) -> None:
        self._transport.abort()

    # ---- called by the event loop ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > MAX_ANSWER_BYTES:  # a compromised reader
            self._transport.abort()
        if len(self._received) >= self._num_wanted:
            self._wake()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.has_ended = True
        self._wake()
