"""What a client sends as a picture -> pixels, in a few threads of their own, within the limits."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from blip2.errors import ImageError
from blip2.image import RgbImage, load_image
from blip2.serve.cache import ImageCache, Look
from blip2.serve.errors import as_api_error
from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""The decoders that strangers may reach: those of the web, and no more."""
NUM_THREADS = 2

Result = TypeVar("Result")
Kept = TypeVar("Kept")


class Pictures:
    """Reads pictures, on behalf of the event loop."""

    def __init__(self, limits: Limits, metrics: Metrics, fetcher: Fetcher) -> None:
        self._limits = limits
        self._metrics = metrics
        self._fetcher = fetcher
        self._decoders = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="blip2 pictures")
        # Apart from the decoders: a slow host must not keep anybody from sending a picture.
        self._fetchers = ThreadPoolExecutor(4 * NUM_THREADS, thread_name_prefix="blip2 fetch")

    async def look(self, source: str | bytes, cache: ImageCache[Kept]) -> Look[Kept]:
        """A picture for a model. Raises ApiError.

        ``source`` is a data address, plain base64, a web address, or the bytes of an image file.
        """
        return await self._read(source, lambda content: cache.look(content, self._load))

    async def read(self, source: str | bytes, use: Callable[[RgbImage], Result]) -> Result:
        """What ``use`` makes of a picture; the picture itself, which may be large, is not kept. Raises ApiError."""
        return await self._read(source, lambda content: use(self._load(content)))

    async def _read(self, source: str | bytes, use: Callable[[bytes], Result]) -> Result:
        loop = asyncio.get_running_loop()
        try:
            if isinstance(source, str) and re.match("https?:", source, re.IGNORECASE):
                source = await loop.run_in_executor(self._fetchers, self._fetcher.fetch, source)
            return await loop.run_in_executor(self._decoders, _use, source, use)
        except Exception as error:
            told = as_api_error(error)
            if told.param == "image":
                self._metrics.image_rejected.labels(told.code).inc()
            raise told from error

    def _load(self, content: bytes) -> RgbImage:
        return load_image(content, max_pixels=self._limits.max_pixels, allow_truncated=None, formats=FORMATS)

    def close(self) -> None:
        for pool in (self._decoders, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)


def _use(source: str | bytes, use: Callable[[bytes], Result]) -> Result:
    return use(decoded(source) if isinstance(source, str) else source)


def decoded(source: str) -> bytes:
    """The bytes in a data address or in plain base64. Raises ImageError; a path or another address is neither."""
    header, comma, payload = source.partition(",") if source[:5].lower() == "data:" else ("", "", source)
    if header and not (comma and header.lower().endswith(";base64")):
        raise ImageError("data address: does not begin with 'data:image/...;base64,'; encode it so")
    try:
        packed = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        content = base64.b64decode(b"".join(packed.split()), validate=True)
    except ValueError:
        raise ImageError(
            f"the {'data' if header else 'picture'} is not valid base64; send data:image/...;base64, and the bytes "
            "of the image file in base64"
        ) from None
    if not content:
        raise ImageError("the picture is empty; send the bytes of an image file in base64")
    return content
