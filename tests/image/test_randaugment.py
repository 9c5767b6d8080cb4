"""Each change by what it does to an image, and all by how often they are drawn."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blip2.image import randaugment, randaugmented
from blip2.image.randaugment import CHANGES, GREY


class Always(random.Random):
    """Draws the first of two ways (``below``) or the second."""

    def __init__(self, below):
        super().__init__(0)
        self.below = below

    def random(self):
        return 0.25 if self.below else 0.75


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(20, 200, (60, 60, 3), np.uint8))


def of(name, image, below=True):
    return np.asarray(getattr(randaugment, f"_{name}")(image, Always(below))).astype(int)


@pytest.mark.parametrize("below", [True, False])
def test_where_things_move(image, below):
    before, sign = np.asarray(image).astype(int), 1 if below else -1
    for name, axis in (("shifted_across", 1), ("shifted_down", 0)):
        after = of(name, image, below)
        inside = [slice(None), slice(None)]
        inside[axis] = slice(5, -5)
        assert np.array_equal(after[tuple(inside)], np.roll(before, -5 * sign, axis)[tuple(inside)])
        edge = [slice(None), slice(None)]
        edge[axis] = slice(-4, None) if below else slice(0, 4)
        assert (after[tuple(edge)] == GREY).all()
    ramp = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8)[None, :, None] * 3 + 20, (60, 1, 3)))
    across = of("sheared_across", ramp, below)[:, 30, 0]
    assert np.allclose(np.diff(across[5:55]).mean(), 3 * 0.15 * sign, atol=0.05)
    turned = of("turned", ramp, below)[:, 30, 0]  # what was on the left is down, or up
    assert np.allclose(np.diff(turned[15:45]).mean(), -3 * np.sin(np.radians(15)) * sign, atol=0.08)


def test_contrast(image):
    stretched = of("stretched", image)
    assert stretched.min() == 0 and stretched.max() == 255
    equal = np.sort(of("equalised", image)[..., 0].ravel())
    assert np.abs(equal - np.linspace(0, 255, len(equal))).max() < 6


def test_two_of_ten_each_made_as_often_as_not(image, monkeypatch):
    made = Counter()
    names = [change.__name__ for change in CHANGES]
    watched = [lambda image, chance, name=name: made.update([name]) or image for name in names]
    monkeypatch.setattr(randaugment, "CHANGES", watched)
    for seed in range(4000):
        randaugmented(image, random.Random(seed))
    assert len(names) == 10 and names.count("_same") == 3
    assert sum(made.values()) == pytest.approx(4000, rel=0.05)
    for name, count in made.items():
        assert count == pytest.approx(400 * names.count(name), rel=0.2)


def test_the_same_for_the_same_seed_and_of_the_same_size(image):
    seen = set()
    for seed in range(60):
        first, again = (randaugmented(image, random.Random(seed)) for _ in range(2))
        assert first.size == image.size and first.mode == "RGB" and first.tobytes() == again.tobytes()
        seen.add(first.tobytes())
    assert len(seen) > 10 and image.tobytes() in seen
