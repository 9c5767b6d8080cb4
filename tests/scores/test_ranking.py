"""Recalls and Winoground's scores: as the authors' library counts them, written out a step at a time."""

from __future__ import annotations

import numpy as np
import pytest

from blip2.scores.ranking import pairs, ranks


def plainly(scores_NM, owner_M):
    """The best rank of an image's texts, and the rank of a text's image, in the reversed order of an argsort."""
    texts = []
    for picture, row in enumerate(scores_NM):
        order = list(np.argsort(row, kind="stable")[::-1])
        texts.append(min(order.index(text) for text, owner in enumerate(owner_M) if owner == picture))
    pictures = []
    for text, owner in enumerate(owner_M):
        order = list(np.argsort(scores_NM[:, text], kind="stable")[::-1])
        pictures.append(order.index(owner))
    return texts, pictures


@pytest.mark.parametrize("kinds", [1000, 3])
def test_ranks_with_and_without_equal_scores(kinds) -> None:
    random = np.random.default_rng(0)
    owners = [number for number in range(20) for _ in range(1 + number % 3)]
    scores = random.integers(0, kinds, (20, len(owners))).astype(np.float32)
    texts, pictures = ranks(scores, owners)
    expected = plainly(scores, owners)
    assert (texts.tolist(), pictures.tolist()) == expected


def test_a_picture_without_texts_finds_none() -> None:
    texts, _ = ranks(np.zeros((2, 1), np.float32), [0])
    assert texts.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[2, 1], [1, 2]], (True, True, True)),
        ([[2, 1], [3, 4]], (True, False, False)),  # each image has its text, but both texts like one image
        ([[2, 3], [1, 4]], (False, True, False)),
        ([[1, 1], [1, 1]], (False, False, False)),
    ],
)
def test_pairs(scores, expected) -> None:
    assert pairs(scores) == expected
