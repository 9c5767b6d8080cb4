"""Any image source -> RGB -> pixels.

An image that cannot be read is an ImageError: one line with the source, the problem and the remedy.

    source   path, URL, bytes, "-", PIL image, array   load_image   ->  RgbImage, upright, opaque, 8 bits
    images   RgbImage, any sizes                       to_pixels    ->  float32[B, 3, size, size]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from blip2.errors import OptionError, option
from blip2.image.decode import MAX_PIXELS, STRIP_PIXELS, RgbImage, decode, from_image
from blip2.image.formats import FORMATS
from blip2.image.sources import Source, from_array, is_tensor, name_of, stream_of

if TYPE_CHECKING:
    import torch

MAX_BYTES = 100 * 2**20
TIMEOUT_S = 20.0
MAX_RESIZE_RATIO = 32
"""An image is resized before its middle is cut out, unless it would get more than this many times the final pixels."""
PIXELS_VERSION = 1
"""Increase this when the same file gives other pixels (colours, orientation, resampling): kept features are then
computed again, and an index of them is refused."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Limits for reading images, as in `load_image`. Raises OptionError for invalid values."""

    max_pixels: int = MAX_PIXELS
    allow_truncated: bool | None = False

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise OptionError(
                f"{option('max_pixels')} is {self.max_pixels}; use 1 or more ({MAX_PIXELS:,} by default)"
            )

    def load(self, source: Source) -> RgbImage:
        """`load_image`. Raises ImageError."""
        return load_image(source, max_pixels=self.max_pixels, allow_truncated=self.allow_truncated)

    def pixels(self, source: Source, **look: Any) -> torch.Tensor:
        """`to_pixels` of one image, float32[3, size, size], without copying an image that is already RGB."""
        return to_pixels([_load(source, self)], **look)[0]


DEFAULT_READING = Reading()


def load_image(
    source: Source,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_truncated: bool | None = False,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = TIMEOUT_S,
    formats: tuple[str, ...] = FORMATS,
) -> RgbImage:
    """Read an image from any source, upright and in sRGB.

    `source` is a path, an http(s) URL, a `data:...;base64,` URL, "-" (standard input), the bytes of an image file, a
    PIL image, an array uint8[H, W] or uint8[H, W, 1 | 3 | 4] (RGB order), or a tensor
    uint8[H, W] or uint8[1 | 3 | 4, H, W].

    The result is RGB. Files are rotated upright (all eight EXIF orientations), and their colours are converted to sRGB
    by the embedded ICC profile; a broken or unsuitable profile counts as sRGB. A PIL image or an array is used as it
    is, like in the reference: not rotated, its profile ignored.

    Transparency is put on white, an animation gives its first frame, and 16-bit grey is scaled to 8 bits
    (v / 257, rounded), integers of 32 bits likewise where they fit 16. Floating-point pixels have no known
    range and are refused.

    `max_pixels` is checked from the header, before decoding; the default admits images of telephones.
    `allow_truncated` accepts a file without its end, if some of its pixels are there; the others are grey or black
    (None: as False, but the error does not mention that option). `max_bytes` and `timeout_s` (seconds, in total) bound
    a download or a pipe; only `formats` are read (Pillow's names). HEIC needs pillow-heif.

    Raises ImageError, one line that names the source, for anything that cannot be read. Pillow's warnings are
    suppressed.
    """
    image = _load(
        source, Reading(max_pixels=max_pixels, allow_truncated=allow_truncated), max_bytes, timeout_s, formats
    )
    is_shared = isinstance(source, Image.Image) and image.im is source.im
    return image.copy() if is_shared else image


def _load(
    source: Source,
    reading: Reading,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = TIMEOUT_S,
    formats: tuple[str, ...] = FORMATS,
) -> RgbImage:
    """As `load_image`, but the result may share its pixels with a given PIL image."""
    name = name_of(source)
    if isinstance(source, np.ndarray) or is_tensor(source):
        source = from_array(source, name)
    if isinstance(source, Image.Image):
        return from_image(source, name, reading.max_pixels)
    with stream_of(source, name, max_bytes, timeout_s) as stream:
        return decode(
            stream,
            name,
            max_pixels=reading.max_pixels,
            formats=formats,
            allow_truncated=reading.allow_truncated,
        )


def to_pixels(
    images: Sequence[RgbImage],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str = "bicubic",
    shortest_edge: int | None = None,
) -> torch.Tensor:
    """RGB images of any sizes -> float32[B, 3, size, size], as in the published processors.

    Every image is resized directly to a square, without cropping or keeping its proportions, with Pillow's filter
    `resample` ("bicubic", "bilinear", "lanczos", ...); values / 255, then (x - mean) / std per channel. With
    `shortest_edge` the shorter side is resized to that many pixels, keeping the proportions, and the middle square is
    cut out. Raises OptionError for an unknown filter.
    """
    import torch

    return torch.from_numpy(
        to_array(images, size=size, mean=mean, std=std, resample=resample, shortest_edge=shortest_edge)
    )


def to_array(
    images: Sequence[RgbImage],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str = "bicubic",
    shortest_edge: int | None = None,
) -> np.ndarray:
    """`to_pixels` without torch."""
    bytes_BHWC = np.empty((len(images), size, size, 3), np.uint8)
    for row_HWC, image in zip(bytes_BHWC, images, strict=True):
        assert image.mode == "RGB", f"to_pixels takes what load_image gives, not mode {image.mode}"
        row_HWC[:] = np.asarray(squared(image, size=size, resample=resample, shortest_edge=shortest_edge))
    # A byte has 256 values, so compute each once and look it up.
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    tables = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return np.stack([table[bytes_BHWC[..., c]] for c, table in enumerate(tables)], axis=1)


def squared(
    image: RgbImage, *, size: int, resample: str = "bicubic", shortest_edge: int | None = None
) -> RgbImage:
    """The square that `to_pixels` makes of an image. Raises OptionError for an unknown filter."""
    try:
        kernel = Image.Resampling[resample.upper()]
    except KeyError:
        known = ", ".join(kernel.name.lower() for kernel in Image.Resampling)
        raise OptionError(f"resample={resample!r} is not a filter; use one of {known}") from None
    box = seen_box(image.width, image.height, size, shortest_edge)
    if shortest_edge is None or box is None:
        return image.resize((size, size), kernel)
    width, height = _resized(image.width, image.height, shortest_edge)
    if width * height > MAX_RESIZE_RATIO * size**2:
        # Resizing an image of one row would give a hundred million pixels. Cutting first rounds a little differently.
        return image.resize((size, size), kernel, box)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), kernel).crop((left, top, left + size, top + size))


def _resized(width: int, height: int, shortest_edge: int) -> tuple[int, int]:
    longer = int(shortest_edge * max(width, height) / min(width, height))
    return (shortest_edge, longer) if width <= height else (longer, shortest_edge)


def seen_box(
    width: int, height: int, size: int, shortest_edge: int | None = None
) -> tuple[float, float, float, float] | None:
    """The part of an image that `to_pixels` keeps: left, top, right and bottom in its pixels; None is all of it."""
    if shortest_edge is None:
        return None
    assert size <= shortest_edge, (size, shortest_edge)
    new_width, new_height = _resized(width, height, shortest_edge)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    x, y = width / new_width, height / new_height
    return left * x, top * y, (left + size) * x, (top + size) * y


def pixels_digest(image: RgbImage) -> str:
    """Digest of the decoded pixels, independent of the file format."""
    found = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # avoids a second copy in memory
        found.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return found.hexdigest()
