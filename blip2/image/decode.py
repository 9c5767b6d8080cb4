"""The bytes of an image file -> RGB, upright, opaque; and a PIL image -> RGB, opaque.

What strangers and cameras write decides about time and memory, so both are bounded: pixels are counted before they are
decoded, a large image is decoded while no other one is, and what is made of its pixels is made strip by strip.
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
"""By default: telephones take images of 200 million. Decoded they are 800 MB, and as much again while turned."""
LARGE_PIXELS = 30_000_000
STRIP_PIXELS = 4_000_000

MAX_SCANS = 100  # of a JPEG; encoders write ten or so
MAX_SEGMENTS = 2000  # before its first scan; Pillow joins them one by one, which takes the square of their number
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
SCAN, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"

ORIENTATION_TAG = 0x0112
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_one_large_picture = threading.Lock()


def decode(
    stream: BinaryIO, name: str, *, max_pixels: int, formats: tuple[str, ...], allow_truncated: bool | None
) -> RgbImage:
    """The image in a stream, as people see it. Raises ImageError."""
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    if not head:
        raise ImageError(f"{name}: empty; there is no image in it, save or download it again")
    _check_format(head, name, formats)
    with quiet():
        try:
            return _decode(stream, head, name, max_pixels, allow_truncated)
        except MemoryError:  # Pillow's own, too, where a line is longer than it can count
            raise ImageSizeError(f"{name}: takes more memory than there is; make the image smaller") from None


def _decode(stream: BinaryIO, head: bytes, name: str, max_pixels: int, allow_truncated: bool | None) -> RgbImage:
    if (size := webp_size(head)) is not None:  # Pillow takes memory for its pixels as soon as it is opened
        _check_size(size, name, max_pixels)
    opened, profile = _open(stream, head, name)
    _check_size(opened.size, name, max_pixels)
    is_large = opened.width * opened.height > LARGE_PIXELS
    with _one_large_picture if is_large else nullcontext():
        image = _load(opened, stream, name, allow_truncated)
        try:
            rgb = _flatten(image, name, profile)
            # Only now: a TIFF turns itself while it loads, and then forgets its tag.
            turn = TURNS.get(_orientation(image))
        except (MemoryError, ImageError):
            raise
        except Exception as error:
            raise ImageError(f"{name}: damaged ({reason_of(error)}); save or download it again") from error
        del image, opened  # their pixels go before they are turned, if they are not the result's
        rgb.info.clear()  # an orientation left behind would turn the image once more when it is loaded again
        return rgb if turn is None else rgb.transpose(turn)


def from_image(image: Image.Image, name: str, max_pixels: int) -> RgbImage:
    """A PIL image as it stands: not turned, and of the colours that its numbers are in sRGB. May share its pixels."""
    _check_size(image.size, name, max_pixels)
    with quiet():
        try:
            image.load()
            rgb = _flatten(image, name, None)
        except (MemoryError, ImageError):
            raise
        except Exception as error:
            problem = f"damaged or cut short ({reason_of(error)})"
            raise ImageError(f"{name}: {problem}; save or download it again") from error
    rgb.info.clear()
    return rgb


# ---- what it is ---------------------------------------------------------------------------------------


def _check_format(head: bytes, name: str, formats: tuple[str, ...]) -> None:
    format = format_of(head)
    refusal = f"{name}: not a {readable(formats)} image"
    if format is None:
        what = foreign(head)
        if not what:
            raise ImageFormatError(f"{refusal}, or damaged; convert it to PNG or JPEG")
        remedy = "" if ";" in what else "; convert it to PNG or JPEG"
        if what == TEXT:  # such as a page of a site that was saved in the place of its image
            is_called_picture = name.rstrip("'").lower().endswith(tuple(suffixes()[0]))
            remedy = "; download it again, or remove it" if is_called_picture else "; name an image"
        raise ImageFormatError(f"{refusal}, but {what}{remedy}")
    if format.name not in formats:
        raise ImageFormatError(f"{refusal}, but {SPOKEN.get(format.name, format.name)}; convert it to PNG or JPEG")
    if needed := format.missing():
        what = SPOKEN.get(format.name, format.name)
        raise ImageFormatError(f"{name}: {what}, which needs {needed}; or convert it to JPEG")


def _open(stream: BinaryIO, head: bytes, name: str) -> tuple[ImageFile, bytes | None]:
    """What Pillow makes of the header, and the colour profile that is embedded."""
    format = format_of(head)
    assert format is not None
    try:
        if format.name == "PNG":
            pixels, profile = png.essence(stream)
            return format.read(pixels), profile
        if format.name == "JPEG":
            _check_segments(stream, name)
        image = format.read(stream)
        is_raw = is_raw_photo(image, head)
    except (MemoryError, ImageError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageSizeError(f"{name}: too many pixels ({reason_of(error)}); make the image smaller") from None
    except Exception as error:  # the codecs raise whatever they stumble over
        raise ImageError(f"{name}: damaged ({reason_of(error)}); save or download it again") from error
    if is_raw:
        raise ImageFormatError(f"{name}: a camera's raw file, of which only a preview could be read; save it as JPEG")
    if format.name == "JPEG":
        _check_scans(stream, name)
    return image, image.info.get("icc_profile")


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP says it has; None for another format, and for none that can be."""
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
    """A JPEG may go over all of its pixels again with every 70 bytes, so that a small file takes hours to decode."""
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
    """Those of the image, without what only looks like one in its metadata, or in what is appended to it."""
    marker = JPEG_MARKER.search(content, 2)
    while marker is not None and marker[0] != END_OF_JPEG:
        yield marker[0]
        length = int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        marker = JPEG_MARKER.search(content, marker.end() + length)


# ---- its pixels ---------------------------------------------------------------------------------------


def _load(image: ImageFile, stream: BinaryIO, name: str, allow_truncated: bool | None) -> ImageFile:
    """The image with its pixels; those that are missing at the end are grey (JPEG) or black if that is allowed."""
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
            remedy = ", or take what is there by allow_truncated=True" if is_offered else ""
            raise ImageError(f"{name}: damaged or cut short ({reason}); save or download it again{remedy}") from error
    try:
        if image.format in ("JPEG", "MPO"):  # its decoder gives out the last rows when it sees the end
            stream.seek(0)
            image = _reopened(io.BytesIO(stream.read() + END_OF_JPEG))
        else:
            image.tile = []  # as if all had been read: what was decoded so far is there
        image.load()
        return image
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: too little of it is there ({reason_of(error)}); download it again") from error


def _reopened(stream: BinaryIO) -> ImageFile:
    format = format_of(b"\xff\xd8\xff")
    assert format is not None
    return format.read(stream)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # broken metadata beside sound pixels
        return 1


def _flatten(image: Image.Image, name: str, profile: bytes | None) -> RgbImage:
    """Any mode, decoded -> RGB of the colours of sRGB, transparency on white. May share its pixels with ``image``."""
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
    """What ``change`` makes of an image, some rows at a time where it is large: it has to work pixel by pixel."""
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
    """Grey of 12, 16 or 32 bits (modes I;16, I) -> L, or LA where one value is declared transparent."""
    values_HW = np.asarray(image).astype(np.int32)
    most = max(black, white)
    if values_HW.min() < 0 or values_HW.max() > most:
        raise ImageError(f"{name}: pixels outside 0..{most} have no known range; scale them to 8 bits first")
    grey = Image.fromarray(((abs(values_HW - black) * 255 + most // 2) // most).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
