"""Request bodies, from the first byte until they are no longer needed. Each is bounded, and so is their sum."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from starlette.types import Message, Receive, Scope

from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits, share_of
from blip2.serve.turns import Turns

GRACE_S = 5.0
MIN_BYTES_PER_S = 1024
"""Minimum average rate of a body in bytes per second, from `GRACE_S` after its head on. A telephone in a poor network
sends ten times that."""
PIECE_BYTES = 2**18
PIECES_PER_TURN = 2
"""Pieces of all large bodies received in one turn of the event loop; the rest stays in the kernel's buffers."""
SOON = {"Retry-After": "1"}


class Body:
    """The bytes of one request. They count from when they are received until `let_go`."""

    def __init__(self, bodies: Bodies, client: str) -> None:
        self.client = client
        self.num_bytes = 0
        self._bodies = bodies
        self._pieces: list[bytearray] = []
        self._timer: asyncio.Timeout | None = None
        self._refusal: ApiError | None = None

    async def receive(self, scope: Scope, receive: Receive, limits: Limits) -> bool:
        """Receive the body. False: the client disconnected. Raises ApiError if it is too large, too slow, or is
        dropped."""
        limit = limits.max_body_bytes
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            raise _too_large(limit)
        began_s = asyncio.get_running_loop().time()
        grace_s = GRACE_S * random.uniform(1, 1.2)  # requests that stalled together should not end together
        num_bytes = 0
        try:
            async with asyncio.timeout(None) as self._timer:
                is_over = False
                while not is_over:
                    if num_bytes:
                        await self._bodies.turn(self.client)
                    if self._refusal is not None:
                        raise self._refusal
                    slow_s = grace_s + num_bytes / MIN_BYTES_PER_S
                    self._timer.reschedule(began_s + min(limits.body_s, slow_s))
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    piece = message.get("body", b"")
                    num_bytes += len(piece)
                    if num_bytes > limit:
                        raise _too_large(limit)
                    self._bodies.add(self, len(piece))
                    self._keep(piece)
                    is_over = not message.get("more_body", False)
        except TimeoutError:
            if self._refusal is not None:
                raise self._refusal from None
            words = f"did not arrive within {limits.body_s:g} s"
            if slow_s < limits.body_s:
                words = f"arrived too slowly, at less than {MIN_BYTES_PER_S} bytes per second"
            raise ApiError(408, "body_timeout", f"the request {words}; send it again", headers=SOON) from None
        finally:
            self._timer = self._refusal = None
        return True

    def _keep(self, piece: bytes) -> None:
        """Store a piece, in parts of medium size: a single growing buffer would be copied again and again."""
        if self._pieces and len(self._pieces[-1]) < PIECE_BYTES:
            self._pieces[-1] += piece
        else:
            self._pieces.append(bytearray(piece))

    @property
    def is_coming(self) -> bool:
        return self._timer is not None

    def evict(self, refusal: ApiError) -> None:
        """Stop receiving this body at once."""
        if self._timer is not None and not self._timer.expired():
            self._refusal = refusal
            self._timer.reschedule(0)
        self.release()

    def replay(self, receive: Receive) -> Receive:
        """Replays the body once, without keeping it; then passes on what the client does (disconnect)."""
        is_given = False

        async def replayed() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            content = b"".join(self._pieces)
            self._pieces.clear()
            return {"type": "http.request", "body": content, "more_body": False}

        return replayed

    def release(self) -> None:
        """The bytes are no longer needed, and no longer count. May be called again."""
        self._pieces.clear()
        self._bodies.remove(self)


class Bodies:
    """All bodies in the server, oldest first."""

    def __init__(self, limits: Limits) -> None:
        self.num_bytes = 0
        self._max_bytes = limits.flight_bytes
        self._bodies: dict[Body, None] = {}
        self._num_bytes_of: Counter[str] = Counter()
        self._waiting: Turns[asyncio.Future[None]] = Turns()
        self._num_taken = 0
        self._is_turning = False

    async def turn(self, client: str) -> None:
        """Wait for this client's turn to have another piece received: see `PIECES_PER_TURN`.

        TCP's flow control slows down clients that send more.
        """
        loop = asyncio.get_running_loop()
        coming = loop.create_future()
        self._waiting.push(client, coming)
        self._begin_turn(loop)
        try:
            await coming
        finally:
            self._waiting.remove(coming)

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(PIECES_PER_TURN - self._num_taken, len(self._waiting))):
            self._num_taken += 1
            coming = self._waiting.pop()
            if not coming.done():
                coming.set_result(None)
        if self._num_taken and not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._end_turn, loop)

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_taken, self._is_turning = 0, False
        self._begin_turn(loop)

    def begin(self, client: str) -> Body:
        body = Body(self, client)
        self._bodies[body] = None
        return body

    def add(self, body: Body, num_bytes: int) -> None:
        """Count ``num_bytes`` more. If there are too many in all, the oldest body that is still being received is
        dropped.

        Stalled bodies are older than flowing ones. A client with several bodies beyond its share loses one of its own.
        Raises ApiError if this body is the oldest, or if all others are complete.
        """
        if body not in self._bodies:
            return  # it was dropped
        while self._num_bytes_of[body.client] + num_bytes > share_of(self._max_bytes):
            own = [each for each in self._bodies if each.client == body.client]
            if len(own) == 1:
                break
            self._make_room(own, body)
        while self.num_bytes + num_bytes > self._max_bytes:
            self._make_room(list(self._bodies), body)
        self._count(body, num_bytes)

    def remove(self, body: Body) -> None:
        if body in self._bodies:
            del self._bodies[body]
            self._count(body, -body.num_bytes)

    def end_all(self, refusal: ApiError) -> None:
        """End everything that is being received with this error."""
        for body in [body for body in self._bodies if body.is_coming]:
            body.evict(refusal)

    def _make_room(self, bodies: list[Body], new_body: Body) -> None:
        coming = [each for each in bodies if each is new_body or (each.is_coming and each.num_bytes)]
        if coming == [new_body]:
            raise ApiError(
                429, "bodies_full", "the server is reading other large requests; try again in a moment", headers=SOON
            )
        if coming[0] is new_body:
            raise _evicted()
        coming[0].evict(_evicted())

    def _count(self, body: Body, num_bytes: int) -> None:
        body.num_bytes += num_bytes
        self.num_bytes += num_bytes
        self._num_bytes_of[body.client] += num_bytes
        if not self._num_bytes_of[body.client]:
            del self._num_bytes_of[body.client]


def _evicted() -> ApiError:
    return ApiError(
        503, "body_gave_way", "too much data is arriving, and this request took longest; send it again", headers=SOON
    )


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the request is larger than {limit:,} bytes; send less at once")
