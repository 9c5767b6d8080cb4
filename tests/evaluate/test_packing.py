"""The order of rows: those of an image together, and in batches of which few divide an image."""

from __future__ import annotations

import random
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from blip2.evaluate.prepare import packed


def rows_of(numbers, seed=0):
    rows = [{"image": str(picture), "number": each} for picture, number in enumerate(numbers) for each in range(number)]
    random.Random(seed).shuffle(rows)
    return rows


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 20))
def test_all_rows_are_there_and_those_of_a_picture_side_by_side(numbers, size):
    rows = rows_of(numbers)
    found = list(packed(rows, size))
    assert sorted(map(repr, found)) == sorted(map(repr, rows))
    runs = [image for image, _ in groupby(found, key=lambda row: row["image"])]
    assert len(runs) == len(set(runs)) == len(numbers)
    for image, own in groupby(found, key=lambda row: row["image"]):
        assert list(own) == [row for row in rows if row["image"] == image]


def test_few_pictures_are_divided_between_batches():
    """As many questions as the images of VQAv2 have."""
    chance = random.Random(0)
    found = list(packed(rows_of([chance.choice([3, 3, 4, 5, 5, 6, 6, 7, 8]) for _ in range(2000)])))
    images = [row["image"] for row in found]
    passes = sum(len(set(images[start : start + 16])) for start in range(0, len(images), 16))
    assert passes < 1.04 * 2000
