"""Colours of a file's ICC profile (Adobe RGB, Display P3, a printer's CMYK, ...) -> sRGB, as in the training images.

With perceptual intent: table-based profiles, such as printers', then keep the steps between colours outside sRGB, as
photo software does. For profiles made of primaries all intents are the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20
SAME_LEVELS = 3
"""A profile that changes no colour by more levels (of 255) counts as sRGB, and the pixels stay unchanged."""
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of its pixels."""

ToRgb = Callable[[Image.Image], Image.Image]
"""Pixels without transparency -> a new RGB image."""


def to_srgb(mode: str, profile: bytes | None) -> ToRgb:
    """A function from pixels of ``mode`` with a profile to sRGB. A broken or unsuitable profile counts as sRGB."""
    if mode == "LAB":  # needs no embedded profile, but Pillow can only convert it with one
        return _transform(None) or plain
    if not isinstance(profile, bytes) or not 128 < len(profile) <= MAX_PROFILE_BYTES:
        return plain
    space = profile[16:20].strip().decode("ascii", "replace")
    is_grey = mode in ("1", "L", "LA")
    if (space == "GRAY" and not is_grey) or ((space == "CMYK") != (mode == "CMYK")) or space not in MODES:
        return plain
    return _transform(profile) or plain


def plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes | None) -> ToRgb | None:
    """None if the profile is broken or a kind of sRGB. ``profile`` None: CIE L*a*b*."""
    try:
        source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = "LAB" if profile is None else MODES[profile[16:20].strip().decode("ascii")]
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.PERCEPTUAL
        )
        if mode in ("RGB", "L"):
            levels = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
            cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
            asked = Image.fromarray(cube if mode == "RGB" else levels[None])
            found = np.asarray(ImageCms.applyTransform(asked, transform), np.int16)
            if np.abs(found - np.asarray(asked.convert("RGB"), np.int16)).max() <= SAME_LEVELS:
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None

    def convert(image: Image.Image) -> Image.Image:
        given = image if image.mode == mode else image.convert(mode)
        converted = ImageCms.applyTransform(given, transform)
        assert converted is not None
        return converted

    return convert
