"""Parts of images: as large as they may be, of the shape they may have, and the same for the same draw."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blip2.image import augmented
from blip2.image.augment import _box


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 1000))
def test_a_part_lies_within(width, height, seed):
    left, top, right, bottom = _box(width, height, random.Random(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


@given(width=st.integers(200, 400), height=st.integers(200, 400), seed=st.integers(0, 1000))
def test_half_of_the_picture_at_least_and_no_strip(width, height, seed):
    left, top, right, bottom = _box(width, height, random.Random(seed))
    ratio = (right - left) / (bottom - top)
    is_middle = (left, top) == ((width - (right - left)) // 2, (height - (bottom - top)) // 2)
    assert 0.74 < ratio < 1.35
    assert is_middle or (right - left) * (bottom - top) > 0.49 * width * height


def test_the_same_draw_shows_the_same_and_half_are_mirrored():
    """The left of what is cut is on the left in one half of all draws."""
    ramp = Image.fromarray(np.repeat(np.arange(240, dtype=np.uint8)[None, :, None], 240, 0).repeat(3, 2))
    mirrored, means = 0, set()
    for seed in range(400):
        first, again = (np.asarray(augmented(ramp, random.Random(seed))) for _ in range(2))
        assert np.array_equal(first, again)
        mirrored += bool(first[0, 0, 0] > first[0, -1, 0])
        means.add((first.shape, first.mean()))
    assert 160 < mirrored < 240 and len(means) > 300
