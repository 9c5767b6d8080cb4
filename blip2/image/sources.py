"""Image sources: files, pipes, standard input, URLs, arrays -> a stream of bytes, or an image."""

from __future__ import annotations

import base64
import io
import os
import re
import select
import stat
import sys
import time
from contextlib import suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard, Union
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

from blip2.errors import ImageError

if TYPE_CHECKING:
    import torch  # not imported at run time: the server's reader processes work without torch

Encoded: TypeAlias = bytes | bytearray | memoryview  # an image file in memory
Source: TypeAlias = Union[str, os.PathLike, Encoded, Image.Image, np.ndarray, "torch.Tensor"]


def is_tensor(source: object) -> TypeGuard[torch.Tensor]:
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def stream_of(source: object, name: str, max_bytes: int, timeout_s: float) -> BinaryIO:
    """The bytes of an image file; ``max_bytes`` and ``timeout_s`` bound a download or a pipe. Raises ImageError."""
    match source:
        case bytes() | bytearray() | memoryview():
            return io.BytesIO(source)
        case "-":
            return io.BytesIO(sys.stdin.buffer.read())
        case str() if re.match("data:", source, re.IGNORECASE):
            return io.BytesIO(_from_data_url(source))
        case str() if re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
            return io.BytesIO(_download(source, name, max_bytes, timeout_s))
        case str() | os.PathLike():
            return _open_file(source, name, max_bytes, timeout_s)
    raise ImageError(f"{name}: not an image; give a path, URL, bytes, PIL image or array")


def name_of(source: object) -> str:
    """What error messages call `source`: short, on one line."""
    match source:
        case str() if source == "-":  # a bare `case "-"` would also compare an array with it
            return "standard input"
        case str() if re.match("data:", source, re.IGNORECASE):
            return "data URL"
        case str() | os.PathLike():
            text = os.fsdecode(source)
            with suppress(UnicodeEncodeError):  # show bytes that are not UTF-8 as shells do: \xe9
                text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            text = text if text.isprintable() and text and text == text.strip() else repr(text)
            return text if len(text) <= 120 else f"{text[:70]}...{text[-40:]}"
        case bytes() | bytearray() | memoryview():
            return f"{len(source)} bytes"
        case Image.Image():
            return str(getattr(source, "filename", "")) or "PIL image"
        case np.ndarray():
            return f"{type(source).__name__} {source.dtype}{list(source.shape)}"
    if is_tensor(source):
        return f"{type(source).__name__} {source.dtype}{list(source.shape)}"
    return type(source).__name__


def reason_of(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_file(path: str | os.PathLike, name: str, max_bytes: int, timeout_s: float) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISFIFO(mode):
            return io.BytesIO(_from_pipe(path, name, max_bytes, timeout_s))
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a device may never end
            raise ImageError(f"{name}: a device or socket, not a file; name an image file")
        return open(path, "rb")
    except FileNotFoundError:
        if os.path.islink(path):
            raise ImageError(f"{name}: a broken link; fix or remove it") from None
        raise ImageError(f"{name}: no such file; check the path (in {os.getcwd()})") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: this is a folder; name an image in it") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise ImageError(f"{name}: cannot be opened ({reason}); check the path and its permissions") from error


def _from_pipe(path: str | os.PathLike, name: str, max_bytes: int, timeout_s: float) -> bytes:
    """The content of a named pipe, such as a shell's <(...). Raises ImageError if nobody writes into it."""
    deadline_s = time.monotonic() + timeout_s
    content = bytearray()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while len(content) <= max_bytes:
            chunk = pipe.read(2**16)
            if chunk == b"":
                if not content:
                    raise ImageError(f"{name}: a pipe without a writer; name an image file")
                return bytes(content)
            if chunk is not None:
                content += chunk
            elif not select.select([pipe], [], [], max(deadline_s - time.monotonic(), 0))[0]:
                raise ImageError(f"{name}: a pipe without data for {timeout_s:g} s; give the image as -")
    raise ImageError(f"{name}: a pipe of more than {max_bytes:,} bytes; write it to a file first")


def _from_data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ImageError("data URL: does not begin with 'data:image/...;base64,'")
    try:
        return base64.b64decode("".join(unquote(payload).split()), validate=True)
    except ValueError as error:
        raise ImageError(f"data URL: not valid base64 ({reason_of(error)}); encode it again") from error


def _download(url: str, name: str, max_bytes: int, timeout_s: float) -> bytes:
    if not re.match("https?://", url, re.IGNORECASE):
        raise ImageError(f"{name}: only http and https URLs are read; download it first")
    # Built by hand, because urllib's own opener would also follow a redirect to ftp://.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    deadline_s = time.monotonic() + timeout_s
    content = bytearray()
    try:
        # Browsers accept URLs with spaces and accents; what is already encoded stays unchanged.
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        asked = request.Request(address, headers={"User-Agent": "blip2 (Python urllib)"})
        with opener.open(asked, timeout=timeout_s) as response:
            while len(content) <= max_bytes and (chunk := response.read1(2**16)):
                content += chunk
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"not finished after {timeout_s:g} s")
    except HTTPError as error:
        error.close()
        reason = reason_of(error.reason)
        raise ImageError(f"{name}: the server answered {error.code} {reason}; check the URL") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = reason_of(getattr(error, "reason", error))
        raise ImageError(f"{name}: cannot be downloaded ({reason}); check the URL and the connection") from error
    if len(content) > max_bytes:
        raise ImageError(f"{name}: larger than {max_bytes:,} bytes; download it first, or raise max_bytes")
    return bytes(content)


def from_array(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    if str(source.dtype).removeprefix("torch.") != "uint8":
        raise ImageError(f"{name}: pixels have to be uint8; convert floats in 0..1 by (255 * x).round()")
    if is_tensor(source):
        layout = "[H, W] or [1 | 3 | 4, H, W]"
        array = (source.permute(1, 2, 0) if source.ndim == 3 else source).numpy(force=True)
    else:
        assert isinstance(source, np.ndarray)
        layout = "[H, W] or [H, W, 1 | 3 | 4]"
        array = source
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ImageError(f"{name}: not one image, which is {layout}; give it in that shape")
    if array.size == 0:
        raise ImageError(f"{name}: has no pixels; give an image of at least 1x1")
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))
