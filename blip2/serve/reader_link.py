"""The server's end of the connection to a process that reads requests (`reader`)."""

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
    """One process, and the connection to it. A message is answered before the next one is sent."""

    def __init__(self, process: int, why_ended: Callable[[Reader], Awaitable[ApiError]]) -> None:
        self.process = process
        self.is_expected = False
        """Whether it was known that this takes long."""
        self.is_slow = False
        self.is_asked = False
        """Whether it owes an answer, so that it can be used no further if that is not waited for."""
        self.is_worn = False
        """Whether it is better replaced after this request."""
        self.new_bytes = 0
        """The memory that it held when it was new."""
        self.has_ended = False
        self.began_s = 0.0
        """On its own clock, see `processor_s`."""
        self.client = ""
        self.watch: asyncio.TimerHandle
        self.refusal: ApiError | None = None
        """Why it was ended, if we did it."""
        self._why_ended = why_ended
        self._received = bytearray()
        self._change: asyncio.Future[None] | None = None
        """Of what is waited for: bytes, or room for them, or its end."""
        self._num_wanted = 0
        self._is_full = False

    async def ask(self, asked: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """Its answer. Raises ApiError for what it says is wrong with the request, and if it ends: for its time, its
        memory, a fault in a decoder, or because it was killed."""
        self.is_asked = True
        try:
            await self._send(frames.packed(asked, len(payload)), payload)
            num_json, num_payload = frames.lengths(await self._take(frames.HEAD.size))
            told = json.loads(await self._take(num_json))
            content = await self._take(num_payload)
        except (OSError, ValueError) as error:
            raise self.refusal or await self._why_ended(self) from error
        self.is_asked = False
        if "error" in told:
            status, code, message, param = told["error"]
            raise ApiError(status, code, message, param=param)
        return told, content

    async def _send(self, head: bytes, payload: bytes) -> None:
        if len(payload) <= PIECE_BYTES:
            self._transport.write(head + payload)
            return
        self._transport.write(head)
        pieces = memoryview(payload)
        for start in range(0, len(payload), PIECE_BYTES):  # what does not go at once is copied
            self._transport.write(pieces[start : start + PIECE_BYTES])
            while self._is_full:
                await self._changed()

    async def _take(self, number: int) -> bytearray:
        """The next bytes."""
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

    def _tell(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    def close(self) -> None:
        self._transport.abort()

    # ---- for the event loop ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > MAX_ANSWER_BYTES:  # whoever has taken it over
            self._transport.abort()
        if len(self._received) >= self._num_wanted:
            self._tell()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self.has_ended = True
        self._tell()
