"""RandAugment (Cubuk et al. 2020) as in the authors' fine-tuning: ``RandomAugment(2, 5, ...)`` of LAVIS.

Two of ten operations are drawn, with replacement, and each is applied with probability 1/2. All have strength 5 of 10,
where brightness and sharpness have factor 1: they can be drawn, but change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageOps

from blip2.image.decode import RgbImage

NUM_CHANGES = 2
STRENGTH = 5 / 10
DEGREES = 30 * STRENGTH
SHEAR = 0.3 * STRENGTH
SHIFT_PX = 10 * STRENGTH
"""Maximum shift in pixels, for an image of the model's size."""
GREY = (128, 128, 128)
"""Colour of pixels from outside the image."""

Change = Callable[[RgbImage, random.Random], RgbImage]


def randaugmented(image: RgbImage, chance: random.Random) -> RgbImage:
    """An image of the same size; deterministic for a state of ``chance``."""
    for change in chance.choices(CHANGES, k=NUM_CHANGES):
        if chance.random() < 0.5:
            image = change(image, chance)
    return image


def _same(image: RgbImage, chance: random.Random) -> RgbImage:
    return image


def _stretched(image: RgbImage, chance: random.Random) -> RgbImage:
    """Stretch each channel to 0 to 255."""
    return ImageOps.autocontrast(image)


def _equalised(image: RgbImage, chance: random.Random) -> RgbImage:
    return ImageOps.equalize(image)


def _turned(image: RgbImage, chance: random.Random) -> RgbImage:
    return image.rotate(_either_way(DEGREES, chance), Image.Resampling.BILINEAR, fillcolor=GREY)


def _sheared_across(image: RgbImage, chance: random.Random) -> RgbImage:
    return _moved(image, (1, _either_way(SHEAR, chance), 0, 0, 1, 0))


def _sheared_down(image: RgbImage, chance: random.Random) -> RgbImage:
    return _moved(image, (1, 0, 0, _either_way(SHEAR, chance), 1, 0))


def _shifted_across(image: RgbImage, chance: random.Random) -> RgbImage:
    return _moved(image, (1, 0, _either_way(SHIFT_PX, chance), 0, 1, 0))


def _shifted_down(image: RgbImage, chance: random.Random) -> RgbImage:
    return _moved(image, (1, 0, 0, 0, 1, _either_way(SHIFT_PX, chance)))


def _moved(image: RgbImage, where: tuple[float, ...]) -> RgbImage:
    """``where`` (a, b, c, d, e, f): the pixel at x, y comes from a x + b y + c, d x + e y + f."""
    return image.transform(image.size, Image.Transform.AFFINE, where, Image.Resampling.BILINEAR, fillcolor=GREY)


def _either_way(amount: float, chance: random.Random) -> float:
    return amount if chance.random() < 0.5 else -amount


CHANGES: tuple[Change, ...] = (
    _same, _same, _same,  # and brightness, and sharpness
    _stretched, _equalised, _turned, _sheared_across, _sheared_down, _shifted_across, _shifted_down,
)  # fmt: skip
