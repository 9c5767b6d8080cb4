"""Routes whose work is cancelled when the client disconnects or the deadline passes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from blip2.serve.admission import END
from blip2.serve.errors import ApiError
from blip2.serve.places import too_late

BODY = "blip2.body"
"""Scope key of the body's bytes, for the function that takes them."""


class Attended(APIRoute):
    """A route that can be cancelled. A streamed answer handles this itself."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def attended(request: Request) -> Response:
            if request.method != "POST":
                return await handle(request)
            message = await request.receive()
            request.scope[BODY] = message.get("body", b"")
            del message
            return await attend(request, handle(request))

        return attended


async def attend(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of the work. Raises ApiError if it is cancelled."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_hang_up(request))
    try:
        left_s = max(request.scope[END] - time.monotonic(), 0)
        await asyncio.wait((task, disconnected), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if disconnected.done():
            raise ApiError(499, "client_closed_request", "the client disconnected")
        raise too_late()
    finally:
        disconnected.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=1)  # let it release its resources


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
