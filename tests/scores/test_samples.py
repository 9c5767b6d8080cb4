"""Intervals and comparisons by drawing anew."""

from __future__ import annotations

import numpy as np
import pytest

from blip2.scores import interval, paired, wilson


def test_the_interval_is_that_of_the_mean() -> None:
    random = np.random.default_rng(0)
    scores = random.random(2000) < 0.6
    low, high = interval(scores)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 2000)
    assert low == pytest.approx(scores.mean() - half, abs=0.005)
    assert high == pytest.approx(scores.mean() + half, abs=0.005)
    assert interval(scores) == (low, high)  # the same draws


def test_questions_about_one_picture_belong_together() -> None:
    scores = np.repeat(np.random.default_rng(1).random(100) < 0.5, 20)
    alone = interval(scores)
    together = interval(scores, [place // 20 for place in range(2000)])
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_whether_two_models_differ() -> None:
    random = np.random.default_rng(2)
    one = random.random(500) < 0.5
    assert paired(one, one) == 1
    better = one | (random.random(500) < 0.2)
    assert paired(better, one) < 0.01
    other = np.roll(one, 1)
    assert paired(other, one) > 0.05


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(ValueError):
        interval([])
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 0.0])
    with pytest.raises(ValueError):
        interval([1.0, 0.0], ["a"])


def test_wilson():
    assert wilson(0.0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson(1.0, 100) == pytest.approx((0.9630, 1), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    with pytest.raises(ValueError, match="no scores"):
        wilson(0.0, 0)
