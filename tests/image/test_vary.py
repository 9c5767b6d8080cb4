"""An image stored otherwise: the same one, or a part of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from blip2.image import as_jpeg, cut, load_image, turned


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 29, 3), dtype=np.uint8))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_with_its_tag_is_the_same_picture(picture, orientation):
    content = turned(picture, orientation)
    stored = Image.open(io.BytesIO(content))
    assert stored.size == ((13, 29) if orientation > 4 else (29, 13))
    assert stored.size != picture.size or not np.array_equal(stored, picture)
    assert np.array_equal(load_image(content), picture)


def test_the_middle(picture):
    middle = load_image(cut(picture, 0.5))
    assert middle.size == (15, 7) and np.array_equal(middle, np.asarray(picture)[3:10, 7:22])
    assert load_image(cut(picture.crop((0, 0, 1, 1)), 0.1)).size == (1, 1)
    assert np.array_equal(load_image(cut(picture, 1.0)), picture)


def test_jpegs(picture):
    assert load_image(as_jpeg(picture, 20)).size == picture.size
    assert len(as_jpeg(picture, 20)) < len(as_jpeg(picture, 90))
