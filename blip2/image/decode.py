"""The bytes of an image file -> RGB, upright, opaque; and a PIL image -> RGB, opaque.

Files are untrusted, so time and memory are bounded: pixels are counted before decoding, large images are decoded one at
a time, and conversions work strip by strip.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice, takewhile
from typing import IO, BinaryIO, TypeAlias

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from blip2.errors import ImageError, ImageFormatError, ImageSizeError
from blip2.image import png
from blip2.image.colour import plain, to_srgb
from blip2.image.formats import (
    HEAD_BYTES,
    SPOKEN,
    TEXT,
    foreign,
    format_of,
    grey_range,
    is_raw_photo,
    readable,
    suffixes,
)
from blip2.image.quiet import quiet
from blip2.image.sources import reason_of

RgbImage: TypeAlias = Image.Image

MAX_PIXELS = 250_000_000
"""Default limit: telephones take images of 200 million pixels. Decoded they take 800 MB, and twice that while
rotated."""
LARGE_PIXELS = 30_000_000
STRIP_PIXELS = 4_000_000

MAX_SCANS = 100  # of a JPEG; encoders write about ten
MAX_SEGMENTS = 2000  # before the first scan; Pillow joins them in quadratic time
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
SCAN, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"

ORIENTATION_TAG = 0x0112
TURNS = {  # EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_one_large_image = threading.Lock()


def decode(
    stream: BinaryIO, name: str, *, max_pixels: int, formats: tuple[str, ...], allow_truncated: bool | None
) -> RgbImage:
    """Decode the image in a stream, upright. Raises ImageError."""
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    if not head:
        raise ImageError(f"{name}: empty; save or download it again")
    _check_format(head, name, formats)
    with quiet():
        try:
            return _decode(stream, head, name, max_pixels, allow_truncated)
        except MemoryError:  # Pillow raises it too, for a line that is too long
            raise ImageSizeError(f"{name}: needs more memory than there is; make the image smaller") from None


def _decode(stream: BinaryIO, head: bytes, name: str, max_pixels: int, allow_truncated: bool | None) -> RgbImage:
    if (size := webp_size(head)) is not None:  # Pillow allocates its pixels on opening
        _check_size(size, name, max_pixels)
    opened, profile = _open(stream, head, name)
    _check_size(opened.size, name, max_pixels)
    is_large = opened.width * opened.height > LARGE_PIXELS
    with _one_large_image if is_large else nullcontext():
        image = _load(opened, stream, name, allow_truncated)
        try:
            rgb = _flatten(image, name, profile)
            # Only now: Pillow rotates a TIFF while loading and removes the tag.
            turn = TURNS.get(_orientation(image))
        except (MemoryError, ImageError):
            raise
        except Exception as error:
            raise ImageError(f"{name}: damaged ({reason_of(error)}); save or download it again") from error
        del image, opened  # frees their pixels before the rotation, unless the result shares them
        rgb.info.clear()  # a remaining orientation would rotate the image again on loading
        return rgb if turn is None else rgb.transpose(turn)


def from_image(image: Image.Image, name: str, max_pixels: int) -> RgbImage:
    """A PIL image as it is: not rotated, its numbers taken as sRGB. May share its pixels."""
    _check_size(image.size, name, max_pixels)
    with quiet():
        try:
            image.load()
            rgb = _flatten(image, name, None)
        except (MemoryError, ImageError):
            raise
        except Exception as error:
            problem = f"damaged or truncated ({reason_of(error)})"
            raise ImageError(f"{name}: {problem}; save or download it again") from error
    rgb.info.clear()
    return rgb


# ---- format ---------------------------------------------------------------------------------------


def _check_format(head: bytes, name: str, formats: tuple[str, ...]) -> None:
    format = format_of(head)
    refusal = f"{name}: not a {readable(formats)} image"
    if format is None:
        what = foreign(head)
        if not what:
            raise ImageFormatError(f"{refusal}, or damaged; convert it to PNG or JPEG")
        remedy = "" if ";" in what else "; convert it to PNG or JPEG"
        if what == TEXT:  # such as a web page saved instead of its image
            is_called_image = name.rstrip("'").lower().endswith(tuple(suffixes()[0]))
            remedy = "; download it again, or remove it" if is_called_image else "; name an image"
        raise ImageFormatError(f"{refusal}, but {what}{remedy}")
    if format.name not in formats:
        raise ImageFormatError(f"{refusal}, but {SPOKEN.get(format.name, format.name)}; convert it to PNG or JPEG")
    if needed := format.missing():
        what = SPOKEN.get(format.name, format.name)
        raise ImageFormatError(f"{name}: {what}, which needs {needed}; or convert it to JPEG")


def _open(stream: BinaryIO, head: bytes, name: str) -> tuple[ImageFile, bytes | None]:
    """Pillow's image after reading the header, and the embedded colour profile."""
    format = format_of(head)
    assert format is not None
    try:
        if format.name == "PNG":
            pixels, profile = png.strip_png(stream)
            return format.read(pixels), profile
        if format.name == "JPEG":
            _check_segments(stream, name)
        image = format.read(stream)
        is_raw = is_raw_photo(image, head)
    except (MemoryError, ImageError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageSizeError(f"{name}: too many pixels ({reason_of(error)}); make the image smaller") from None
    except Exception as error:  # codecs raise all kinds of exceptions
        raise ImageError(f"{name}: damaged ({reason_of(error)}); save or download it again") from error
    if is_raw:
        raise ImageFormatError(f"{name}: a camera's raw file, of which only the preview is readable; save it as JPEG")
    if format.name == "JPEG":
        _check_scans(stream, name)
    return image, image.info.get("icc_profile")


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP; None for another format, and for impossible values."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            found = [int.from_bytes(head[place : place + 2], "little") & 0x3FFF for place in (26, 28)]
            return (found[0], found[1]) if all(found) else None
    return None


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if not width or not height:
        raise ImageError(f"{name}: has no pixels ({width}x{height}); give an image of at least 1x1")
    if width * height > max_pixels:
        problem = f"{width}x{height} is more than {max_pixels:,} pixels"
        raise ImageSizeError(f"{name}: {problem}; make it smaller, or raise max_pixels")


def _check_segments(stream: IO[bytes], name: str) -> None:
    before_scan = takewhile(lambda marker: marker != SCAN, _markers(_whole(stream)))
    if sum(1 for _ in islice(before_scan, MAX_SEGMENTS + 1)) > MAX_SEGMENTS:
        raise ImageError(f"{name}: a JPEG of more than {MAX_SEGMENTS:,} segments of metadata; save it again")


def _check_scans(stream: IO[bytes], name: str) -> None:
    """Limit the scans: a JPEG can rewrite all of its pixels every 70 bytes, so a small file could take hours to
    decode."""
    content = _whole(stream)
    if content.count(SCAN) > MAX_SCANS and _num_scans(content) > MAX_SCANS:
        raise ImageError(f"{name}: a JPEG of more than {MAX_SCANS} scans; save it again")


def _whole(stream: IO[bytes]) -> bytes:
    place = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(place)
    return content


def _num_scans(content: bytes) -> int:
    return sum(marker == SCAN for marker in _markers(content))


def _markers(content: bytes) -> Iterator[bytes]:
    """The markers of the image, without false ones in its metadata or appended data."""
    marker = JPEG_MARKER.search(content, 2)
    while marker is not None and marker[0] != END_OF_JPEG:
        yield marker[0]
        length = int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        marker = JPEG_MARKER.search(content, marker.end() + length)


# ---- pixels ---------------------------------------------------------------------------------------


def _load(image: ImageFile, stream: BinaryIO, name: str, allow_truncated: bool | None) -> ImageFile:
    """The image with its pixels. If allowed, missing pixels at the end are grey (JPEG) or black."""
    try:
        image.load()
        return image
    except MemoryError:
        raise
    except Exception as error:
        reason = reason_of(error)
        is_cut = "truncated" in reason
        if not (is_cut and allow_truncated):
            is_offered = is_cut and allow_truncated is not None
            remedy = ", or read the rest with allow_truncated=True" if is_offered else ""
            raise ImageError(f"{name}: damaged or truncated ({reason}); save or download it again{remedy}") from error
    try:
        if image.format in ("JPEG", "MPO"):  # its decoder returns the last rows at the end marker
            stream.seek(0)
            image = _reopened(io.BytesIO(stream.read() + END_OF_JPEG))
        else:
            image.tile = []  # pretend that all was read: keep the decoded part
        image.load()
        return image
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: too little of the file is there ({reason_of(error)}); download it again") from error


def _reopened(stream: BinaryIO) -> ImageFile:
    format = format_of(b"\xff\xd8\xff")
    assert format is not None
    return format.read(stream)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # broken metadata, but intact pixels
        return 1


def _flatten(image: Image.Image, name: str, profile: bytes | None) -> RgbImage:
    """A decoded image of any mode -> sRGB, transparency on white. May share its pixels with ``image``."""
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range; scale them to 8 bits first")
    convert = to_srgb("L" if image.mode.startswith("I") else image.mode, profile)
    if image.mode == "RGB" and convert is plain and not image.has_transparency_data:
        return image._new(image.im)

    black, white = grey_range(image)

    def flat(part: Image.Image) -> Image.Image:
        if part.mode.startswith("I"):
            part = _to_8_bits(part, name, black, white)
        part = part.convert("LA") if part.mode == "La" else part
        if not part.has_transparency_data:
            return convert(part)
        layered = part.convert("RGBA")
        colours = convert(layered.convert("RGB") if part.mode != "LA" else part.convert("L"))
        colours.putalpha(layered.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", part.size, "white"), colours).convert("RGB")

    return _in_strips(image, flat)


def _in_strips(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """``change`` applied to an image, in strips of rows if it is large. ``change`` has to work pixel by pixel."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return change(image)
    changed = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        changed.paste(change(image.crop(box)), box)
    return changed


def _to_8_bits(image: Image.Image, name: str, black: int, white: int) -> Image.Image:
    """Grey of 12, 16 or 32 bits (modes I;16, I) -> L, or LA if one value is declared transparent."""
    values_HW = np.asarray(image).astype(np.int32)
    most = max(black, white)
    if values_HW.min() < 0 or values_HW.max() > most:
        raise ImageError(f"{name}: pixels outside 0..{most} have no known range; scale them to 8 bits first")
    grey = Image.fromarray(((abs(values_HW - black) * 255 + most // 2) // most).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
