"""Routes whose work ends when nobody waits for it any more: the client has hung up, or the time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from blip2.serve.doorman import END
from blip2.serve.errors import ApiError
from blip2.serve.places import too_late

BODY = "blip2.body"
"""Where the scope has the bytes of the body, for whoever takes them out."""


class Attended(APIRoute):
    """A route that is cancelled; an answer that is sent piece by piece sees to that by itself."""

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
    """What the work gives. Raises ApiError if it is given up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        left_s = max(request.scope[END] - time.monotonic(), 0)
        await asyncio.wait((task, gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(499, "client_closed_request", "the client hung up")
        raise too_late()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=1)  # it gives back what it holds


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
