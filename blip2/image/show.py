"""Images for display: heat map overlays, thumbnails, files."""

import base64
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from blip2.disk import written
from blip2.errors import ImageError, OptionError
from blip2.image.decode import RgbImage
from blip2.image.read import load_image
from blip2.image.sources import Source, reason_of

WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix -> format

# Heat of 0, 1/4, ..., 1: brighter with each step, so that it is readable in greyscale.
HEAT_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


def overlay(image: RgbImage, heat_HW: np.ndarray) -> RgbImage:
    """The image under a map of its size, float32[H, W] of 0 to 1: dark at 0, coloured at 1."""
    levels = Image.fromarray((heat_HW * 255).round().astype(np.uint8))
    stops = np.linspace(0, 1, len(HEAT_COLOURS))
    colours = [np.interp(np.linspace(0, 1, 256), stops, channel).round() for channel in HEAT_COLOURS.T]
    coloured = levels.copy()
    coloured.putpalette(np.stack(colours, axis=1).astype(np.uint8).tobytes())
    opacity = levels.point([round(102 + 0.3 * level) for level in range(256)])
    return Image.composite(coloured.convert("RGB"), image, opacity)


def check_writable(path: str | os.PathLike[str]) -> str:
    """Pillow's format name for the file's suffix; OptionError if it is not in `WRITABLE`."""
    format = WRITABLE.get(Path(path).suffix.lower())
    if format is None:
        raise OptionError(f"{os.fspath(path)}: images are written as {' '.join(WRITABLE)}; change the file name")
    return format


def save_image(image: RgbImage, path: str | os.PathLike[str]) -> None:
    """Write an image in the format of the file's suffix, atomically.

    Raises OptionError as `check_writable`, ImageError if it cannot be written.
    """
    path, format = Path(path), check_writable(path)
    try:
        with written(path) as unfinished:
            image.save(unfinished, format)
    except OSError as error:
        reason = error.strerror or reason_of(error)
        raise ImageError(f"{path}: cannot be written ({reason}); check the folder and the disk space") from None


def thumbnail(source: Source, size_px: int) -> bytes:
    """A small JPEG of an image, at most ``size_px`` wide and high, with its proportions. Raises ImageError."""
    image = load_image(source)
    image.thumbnail((size_px, size_px))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def shrunk(image: RgbImage, size_px: int) -> RgbImage:
    """A copy of at most ``size_px`` wide and high, with its proportions."""
    small = image.copy()
    small.thumbnail((size_px, size_px))
    return small


def grey_address(values_HW: np.ndarray) -> str:
    """A map float32[H, W] of 0 to 1 as a grey PNG in a data URL, for web pages: black 0, white 1."""
    stream = io.BytesIO()
    Image.fromarray((values_HW * 255).round().astype(np.uint8)).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
