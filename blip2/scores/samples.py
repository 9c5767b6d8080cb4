"""Confidence intervals of means, and significance of the difference of two models, by resampling images (Efron,
1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
Z95 = 1.96
"""95 % of a normal distribution lie within this many standard deviations."""
CHUNK = 2**22
"""Random numbers drawn at a time."""


def interval(scores: Sequence[float], groups: Sequence[object] | None = None, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean. ``groups``: the image of each score, since questions about one image are not
    independent; by default each score is its own group. Raises ValueError without scores."""
    sums, counts = _by_group(scores, groups)
    means = _drawn_means(sums, counts, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of a share, 0 to 1, of ``number`` independent trials (Wilson, 1927). Unlike `interval` it also
    works if none or all of a few succeed. Raises ValueError for no trials."""
    if number < 1:
        raise ValueError("there are no scores")
    square = Z95 * Z95 / number
    middle = (share + square / 2) / (1 + square)
    half = Z95 * math.sqrt(share * (1 - share) / number + square / (4 * number)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(
    left: Sequence[float], right: Sequence[float], groups: Sequence[object] | None = None, *, seed: int = 0
) -> float:
    """The p-value of the difference of two means over the same items: the probability of a difference at least as large
    if neither is better, with random signs for each image. Raises ValueError for different lengths."""
    if len(left) != len(right):
        raise ValueError(f"{len(left)} scores and {len(right)} scores do not belong to the same items")
    sums, _ = _by_group(np.asarray(left, float) - np.asarray(right, float), groups)
    found = abs(sums.sum())
    random = np.random.default_rng(seed)
    as_large = 0
    for some in _chunks(len(sums)):
        signs = random.integers(0, 2, (some, len(sums)), dtype=np.int8) * 2 - 1
        as_large += int((np.abs(signs @ sums) >= found - 1e-12).sum())
    return (as_large + 1) / (DRAWS + 1)


def _by_group(scores: Sequence[float] | np.ndarray, groups: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(scores, float)
    if not len(values):
        raise ValueError("there are no scores")
    if groups is None:
        return values, np.ones(len(values))
    numbers: dict[object, int] = {}
    places = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    if len(places) != len(values):
        raise ValueError(f"{len(values)} scores have {len(places)} groups")
    return np.bincount(places, values), np.bincount(places).astype(float)


def _drawn_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    means = []
    for some in _chunks(len(sums)):
        drawn = random.integers(0, len(sums), (some, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _chunks(number: int) -> list[int]:
    """Sizes of the chunks, `DRAWS` in all."""
    most = max(1, min(DRAWS, CHUNK // max(number, 1)))
    return [min(most, DRAWS - begun) for begun in range(0, DRAWS, most)]
