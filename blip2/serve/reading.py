"""A request for the routes: its checked fields, and its images as input of a model.

A reader process (`pool`) does everything whose cost grows with the request. A large image waits until few others are
being decoded, and an image at a URL is downloaded by a thread; both return their reader meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request
from torch import Tensor

from blip2.image import RgbImage, load_image
from blip2.serve.admission import CLIENT, RELEASE
from blip2.serve.attention import BODY
from blip2.serve.cache import ImageCache, Look
from blip2.serve.errors import ApiError, as_api_error
from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.pool import KILLED, Pool
from blip2.serve.reader_link import Reader
from blip2.serve.turns import FairPool
from blip2.tasks.see import ImageFrontend

SMALL_PIXELS, LARGE_PIXELS = 4_000_000, 30_000_000
"""Images of up to the first number are decoded without waiting; above the second, one at a time; in between, a few."""
NUM_BETWEEN = min(4, max(2, (os.cpu_count() or 1) // 2))
MAX_KILLED = 2
"""How often a request is read again after its reader was killed."""
NUM_FETCHERS = 8

Kept = TypeVar("Kept")


class Readings:
    """Reads requests. Call ``start`` in the event loop. ``close`` ends everything being read."""

    def __init__(self, limits: Limits, metrics: Metrics, fetcher: Fetcher) -> None:
        self.limits = limits
        self.metrics = metrics
        self.pool = Pool(limits)
        self.lanes: list[tuple[float, FairPool[None]]] = [
            (LARGE_PIXELS, FairPool([None] * NUM_BETWEEN)), (math.inf, FairPool([None])),
        ]  # fmt: skip
        """For images that are not small: the maximum pixels, and the places to decode them."""
        self._fetcher = fetcher
        # Not in the event loop's default threads, which a slow host would block for others.
        self._fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="blip2 fetch")

    def start(self) -> None:
        self.pool.start()

    def close(self) -> None:
        self.pool.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Reading]:
        """The request; its images are available within the context. Raises ApiError."""
        content = request.scope.pop(BODY)
        try:
            async with AsyncExitStack() as held:
                reading = Reading(self, request, content, held)
                del content
                try:
                    await reading.begin()
                    yield reading
                finally:
                    reading.forget()
        except ApiError as error:
            if error.param == "image":
                self.metrics.image_rejected.labels(error.code).inc()
            raise
        finally:
            request.scope.get(RELEASE, lambda: None)()

    async def fetch(self, address: str) -> bytes:
        """Download an image. Raises ApiError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._fetchers, self._fetcher.fetch, address)
        except Exception as error:
            raise as_api_error(error) from error


class Reading:
    """``fields``: see `body.read`."""

    fields: dict[str, Any]

    def __init__(self, readings: Readings, request: Request, content: bytes, held: AsyncExitStack) -> None:
        self._readings = readings
        self._route: str = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        self._kind = request.headers.get("content-type", "")
        self._packing = request.headers.get("content-encoding", "")
        self.client: str = request.scope.get(CLIENT, "")
        self._content = content
        self._fetched = b""
        self._held = held
        self._reader: Reader | None = None
        self._images: list[dict[str, str]] = []
        self._num_pixels = 0
        self._num_killed = 0

    async def begin(self) -> None:
        """Parse the request. Raises ApiError if it is invalid."""
        if self._packing.strip().lower() not in ("", "identity"):
            message = (
                f"the body is compressed ({self._packing[:40]}); send it uncompressed, without Content-Encoding"
            )
            raise ApiError(415, "unsupported_encoding", message, headers={"Accept-Encoding": "identity"})
        reply = await self._read_again()
        self.fields, self._images = reply["fields"], reply["pictures"]

    def forget(self) -> None:
        """Release the bytes; nothing more is read from the request."""
        self._content = self._fetched = b""

    @property
    def num_images(self) -> int:
        return len(self._images)

    async def look(self, place: int, cache: ImageCache[Kept]) -> Look[Kept]:
        """An image for a model. An image in the cache is not even decoded. Raises ApiError."""
        file = await self._file(place)
        if (look := cache.known(file)) is not None:
            return look
        reply, pixels_CHW, _ = await self._decoded(place, cache.frontend, 0)
        return cache.look(file, reply["digest"], pixels_CHW)

    async def shown(self, place: int, frontend: ImageFrontend[Any], size_px: int) -> tuple[RgbImage, Tensor]:
        """An image with sides of at most ``size_px``, and the model's input of it. Raises ApiError."""
        await self._file(place)
        reply, pixels_CHW, small = await self._decoded(place, frontend, size_px)
        width, height = reply["shown"]
        return load_image(np.frombuffer(small, np.uint8).reshape(height, width, 3)), pixels_CHW

    async def _file(self, place: int) -> str:
        """The digest of the image's file, which the reader holds afterwards."""
        if (address := self._images[place].get("address")) is not None:
            await self._leave()
            self._fetched = await self._readings.fetch(address)
            await self._read_again()
            self._images[place] = await self._take(place)
        return self._images[place]["file"]

    async def _decoded(
        self, place: int, frontend: ImageFrontend[Any], shown_px: int
    ) -> tuple[dict[str, Any], Tensor, bytearray]:
        assert self._reader is not None
        left = max(self._readings.limits.max_pixels - self._num_pixels, 1)
        asked = {"do": "pixels", "picture": place, "look": frontend.look, "shown_px": shown_px}

        async def decode(most: float) -> tuple[dict[str, Any], bytearray]:
            return await self._ask({**asked, "max_pixels": int(min(most, left)), "is_last_word": most >= left})

        reply, content = await decode(SMALL_PIXELS)
        for most, lane in self._readings.lanes:
            if "is_large" not in reply:
                break
            if not lane.num_free:
                await self._leave()
            async with lane.lease(self.client):
                if self._reader is None:
                    await self._read_again()
                    await self._take_fetched(place)
                self._readings.pool.demote(self._reader, is_expected=True)
                reply, content = await decode(most)
        self._fetched = b""
        self._num_pixels += reply["num_pixels"]
        number = 3 * frontend.size**2
        pixels_CHW = torch.frombuffer(content, dtype=torch.float32, count=number)
        return reply, pixels_CHW.view(3, frontend.size, frontend.size), content[4 * number :]

    # ---- using readers ----

    async def _read_again(self) -> dict[str, Any]:
        """Parse the request in another reader, if the earlier one was returned."""
        size = len(self._content)
        self._reader = await self._held.enter_async_context(self._readings.pool.reader(self.client, size))
        reply, _ = await self._ask({"do": "read", "route": self._route, "type": self._kind}, self._content)
        return reply

    async def _ask(self, asked: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """The reader's answer; if the reader is killed, that of another one."""
        while True:
            assert self._reader is not None
            try:
                return await self._reader.ask(asked, payload)
            except ApiError as error:
                self._num_killed += error.code == KILLED
                if error.code != KILLED or self._num_killed > MAX_KILLED:
                    raise
            await self._leave()
            reply = await self._read_again()
            if asked["do"] == "read":
                return reply, bytearray()
            if asked["do"] == "pixels":
                await self._take_fetched(asked["picture"])

    async def _take(self, place: int) -> dict[str, str]:
        reply, _ = await self._ask({"do": "take", "picture": place}, self._fetched)
        return reply

    async def _take_fetched(self, place: int) -> None:
        if self._fetched:
            await self._take(place)

    async def _leave(self) -> None:
        self._reader = None
        await self._held.aclose()
