"""Any source of a picture -> RGB -> pixels.

What cannot be read is an ImageError: one line with the source, what is wrong, and the remedy.

    source   path, URL, bytes, "-", PIL image, array   load_image   ->  RgbImage, upright, opaque, 8 bits
    images   RgbImage, any sizes                       to_pixels    ->  float32[B, 3, size, size]
"""

import base64
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from http.client import HTTPException
from typing import IO, BinaryIO, TypeAlias
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, unquote

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from blip2.errors import ImageError, ImageFormatError, ImageSizeError, OptionError

RgbImage: TypeAlias = Image.Image
Encoded: TypeAlias = bytes | bytearray | memoryview  # an image file in memory
Source: TypeAlias = str | os.PathLike | Encoded | Image.Image | np.ndarray | torch.Tensor

# Rasters only: Pillow would also run PostScript and open whole documents.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"

MAX_SCANS = 100  # of a JPEG; encoders write ten or so
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")

ORIENTATION_TAG = 0x0112
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Source,
    *,
    max_pixels: int = 50_000_000,
    max_bytes: int = 20 * 2**20,
    timeout_s: float = 20.0,
    formats: tuple[str, ...] = FORMATS,
) -> RgbImage:
    """Read a picture from wherever it is, as people see it.

    `source` is a path, an http(s) address, a `data:...;base64,` address, "-" (standard input), the bytes
    of an image file, a PIL image, an array uint8[H, W] or uint8[H, W, 1 | 3 | 4] (RGB order), or a tensor
    uint8[H, W] or uint8[1 | 3 | 4, H, W].

    The result is RGB and upright (all eight EXIF orientations). Transparency is laid on white, an
    animation gives its first frame, and 16-bit grey is scaled to 8 bits (v / 257, rounded), integers of
    32 bits likewise where they fit 16. Floating-point pixels have no known range and are refused.

    `max_pixels` is checked from the header, before anything is decoded; `max_bytes` and `timeout_s` bound
    a download (seconds, the whole of it); only `formats` are read (Pillow's names). Raises ImageError, one
    line that names the source, for anything that cannot be read.
    """
    name = name_of(source)
    match source:
        case Image.Image():
            return _to_rgb(source, name, max_pixels)
        case np.ndarray() | torch.Tensor():
            return _to_rgb(_from_array(source, name), name, max_pixels)
        case bytes() | bytearray() | memoryview():
            stream: BinaryIO = io.BytesIO(source)
        case "-":
            stream = io.BytesIO(sys.stdin.buffer.read())
        case str() if re.match("data:", source, re.IGNORECASE):
            stream = io.BytesIO(_from_data_url(source))
        case str() if re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
            stream = io.BytesIO(_download(source, name, max_bytes, timeout_s))
        case str() | os.PathLike():
            stream = _open_file(source, name)
        case _:
            raise ImageError(f"{name}: not a picture; give a path, address, bytes, PIL image or array")
    with stream:
        return _decode(stream, name, max_pixels, formats)


def to_pixels(
    images: Sequence[RgbImage],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str = "bicubic",
) -> torch.Tensor:
    """RGB images of any sizes -> float32[B, 3, size, size], as the published processors make them.

    Every image is resized straight to a square, without crop and without keeping its proportions, by
    Pillow's filter `resample` ("bicubic", "bilinear", "lanczos", ...); values / 255, then (x - mean) / std
    per channel. Raises OptionError for an unknown filter.
    """
    try:
        kernel = Image.Resampling[resample.upper()]
    except KeyError:
        known = ", ".join(kernel.name.lower() for kernel in Image.Resampling)
        raise OptionError(f"resample={resample!r} is not a filter; use one of {known}") from None
    bytes_BHWC = np.empty((len(images), size, size, 3), np.uint8)
    for row_HWC, image in zip(bytes_BHWC, images, strict=True):
        assert image.mode == "RGB", f"to_pixels takes what load_image gives, not mode {image.mode}"
        row_HWC[:] = np.asarray(image.resize((size, size), kernel))
    # A byte has 256 values, so the arithmetic is done once per value and then looked up.
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    tables = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    pixels_BCHW = np.stack([table[bytes_BHWC[..., c]] for c, table in enumerate(tables)], axis=1)
    return torch.from_numpy(pixels_BCHW)


# ---- sources ------------------------------------------------------------------------------------------


def name_of(source: object) -> str:
    """What an error calls `source`: short, on one line."""
    match source:
        case str() if source == "-":  # a bare `case "-"` would also ask an array whether it equals that
            return "standard input"
        case str() if re.match("data:", source, re.IGNORECASE):
            return "data address"
        case str() | os.PathLike():
            text = os.fsdecode(source)
            text = text if text.isprintable() and text else repr(text)
            return text if len(text) <= 120 else f"{text[:70]}...{text[-40:]}"
        case bytes() | bytearray() | memoryview():
            return f"{len(source)} bytes"
        case Image.Image():
            return str(getattr(source, "filename", "")) or "PIL image"
        case np.ndarray() | torch.Tensor():
            return f"{type(source).__name__} {source.dtype}{list(source.shape)}"
    return type(source).__name__


def reason_of(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_file(path: str | os.PathLike, name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file; check the path (seen from {os.getcwd()})") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: this is a folder; name a picture in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise ImageError(f"{name}: cannot be opened ({reason}); check the path and its rights") from error


def _from_data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ImageError("data address: does not begin with 'data:image/...;base64,'; encode it so")
    try:
        return base64.b64decode("".join(unquote(payload).split()), validate=True)
    except ValueError as error:
        raise ImageError(f"data address: not valid base64 ({reason_of(error)}); encode it again") from error


def _download(url: str, name: str, max_bytes: int, timeout_s: float) -> bytes:
    if not re.match("https?://", url, re.IGNORECASE):
        raise ImageError(f"{name}: only http and https addresses are read; download it first")
    # Put together by hand, because urllib's own opener would also follow a redirect to ftp://.
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
        # Browsers also take addresses with spaces and accents; what is already encoded stays as it is.
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
        raise ImageError(f"{name}: the server says {error.code} {reason}; check the address") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = reason_of(getattr(error, "reason", error))
        raise ImageError(f"{name}: cannot be downloaded ({reason}); check address and connection") from error
    if len(content) > max_bytes:
        raise ImageError(f"{name}: larger than {max_bytes:,} bytes; download it first, or raise max_bytes")
    return bytes(content)


def _from_array(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    if str(source.dtype).removeprefix("torch.") != "uint8":
        raise ImageError(f"{name}: pixels have to be uint8; make floats in 0..1 (255 * x).round() first")
    if isinstance(source, torch.Tensor):
        layout = "[H, W] or [1 | 3 | 4, H, W]"
        array = (source.permute(1, 2, 0) if source.ndim == 3 else source).numpy(force=True)
    else:
        layout = "[H, W] or [H, W, 1 | 3 | 4]"
        array = source
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ImageError(f"{name}: not one picture, which is {layout}; give it in that shape")
    if array.size == 0:
        raise ImageError(f"{name}: has no pixels; give a picture of at least 1x1")
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


# ---- decoding -----------------------------------------------------------------------------------------


def _decode(stream: BinaryIO, name: str, max_pixels: int, formats: tuple[str, ...]) -> RgbImage:
    try:
        image = Image.open(stream, formats=formats)
    except UnidentifiedImageError:
        if stream.seekable() and stream.seek(0, os.SEEK_END) == 0:
            raise ImageError(f"{name}: empty; there is no picture in it, save or download it again") from None
        readable = READABLE if formats is FORMATS else " or ".join(formats)
        raise ImageFormatError(f"{name}: not a {readable} image, or damaged; convert it to PNG or JPEG") from None
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageSizeError(f"{name}: too many pixels ({reason_of(error)}); make the picture smaller") from None
    except Exception as error:  # the codecs raise whatever they stumble over
        raise ImageError(f"{name}: damaged ({reason_of(error)}); save or download it again") from error
    with image:
        if image.format in ("JPEG", "MPO") and image.fp is not None:
            _check_scans(image.fp, name)
        return _to_rgb(image, name, max_pixels)


def _check_scans(stream: IO[bytes], name: str) -> None:
    """A JPEG may go over all of its pixels again with every 70 bytes, so that a small file takes hours to decode."""
    place = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(place)
    if content.count(b"\xff\xda") > MAX_SCANS and _num_scans(content) > MAX_SCANS:
        raise ImageError(f"{name}: a JPEG of more than {MAX_SCANS} scans; save it again")


def _num_scans(content: bytes) -> int:
    """Those of the picture, without what only looks like one in its metadata, or in what is appended to it."""
    number = 0
    marker = JPEG_MARKER.search(content, 2)
    while marker is not None and marker[0] != b"\xff\xd9":
        number += marker[0] == b"\xff\xda"
        length = int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        marker = JPEG_MARKER.search(content, marker.end() + length)
    return number


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> RgbImage:
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name}: has no pixels ({width}x{height}); give a picture of at least 1x1")
    if width * height > max_pixels:
        problem = f"{width}x{height} is more than {max_pixels:,} pixels"
        raise ImageSizeError(f"{name}: {problem}; make it smaller, or raise max_pixels")
    try:
        image.load()
        rgb = _flatten(image, name)
        # Only now: a TIFF turns itself while it loads, and then forgets its tag.
        turn = TURNS.get(_orientation(image))
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        problem = f"damaged or cut short ({reason_of(error)})"
        raise ImageError(f"{name}: {problem}; save or download it again") from error
    rgb.info.clear()  # an orientation left behind would turn the picture once more when it is loaded again
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # broken metadata beside sound pixels
        return 1


def _flatten(image: Image.Image, name: str) -> RgbImage:
    """Any mode, decoded -> a new RGB image, transparency on white."""
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range; scale them to 8 bits first")
    if image.mode.startswith("I"):
        image = _to_8_bits(image, name)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 or 32 bits (modes I;16, I) -> L, or LA where one value is declared transparent."""
    values_HW = np.asarray(image).astype(np.int32)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        raise ImageError(f"{name}: pixels outside 0..65535 have no known range; scale them to 8 bits first")
    grey = Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
