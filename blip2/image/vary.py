"""Variants of an image: compressed, cropped or rotated, to measure how much a model's output depends on them."""

from __future__ import annotations

import io

from PIL import Image

from blip2.image.decode import ORIENTATION_TAG, TURNS, RgbImage

Turn = Image.Transpose
INVERSE_TURNS = {**TURNS, 6: Turn.ROTATE_90, 8: Turn.ROTATE_270}
"""EXIF orientation -> the operation that rotates an upright image as the tag says."""


def as_jpeg(image: RgbImage, quality: int) -> bytes:
    """``quality``: Pillow's, 1 to 95."""
    return _saved(image, "JPEG", quality=quality)


def cut(image: RgbImage, share: float) -> bytes:
    """A PNG of the middle, with ``share`` (0 to 1) of the width and height."""
    left, top = (round(side * (1 - share) / 2) for side in image.size)
    return _saved(image.crop((left, top, max(image.width - left, left + 1), max(image.height - top, top + 1))), "PNG")


def turned(image: RgbImage, orientation: int) -> bytes:
    """A PNG stored rotated, with its EXIF orientation, 2 to 8: programs that read the tag see the image upright."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return _saved(image.transpose(INVERSE_TURNS[orientation]), "PNG", exif=exif)


def _saved(image: RgbImage, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()
