"""Training augmentation: random resized crop and horizontal flip.

As in the paper (section 3.4) with the authors' numbers: the crop has at least half of the area, and its sides are
between 3:4 and 4:3. It is resized afterwards like every image.
"""

from __future__ import annotations

import math
import random

from PIL import Image

from blip2.image.decode import RgbImage

LEAST_AREA = 0.5
RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def augmented(image: RgbImage, chance: random.Random) -> RgbImage:
    """The augmented image; deterministic for a state of ``chance``."""
    cut = image.crop(_box(image.width, image.height, chance))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else cut


def _box(width: int, height: int, chance: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right and bottom. If ten tries fail, as for very long images: the middle."""
    for _ in range(TRIES):
        area = width * height * chance.uniform(LEAST_AREA, 1)
        ratio = math.exp(chance.uniform(*map(math.log, RATIOS)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = chance.randint(0, width - across), chance.randint(0, height - down)
            return left, top, left + across, top + down
    across = min(width, max(round(height * RATIOS[1]), 1))
    down = min(height, max(round(width / RATIOS[0]), 1))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
