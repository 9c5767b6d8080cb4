"""The rows of each step's batch, as a function of the seed and the step alone.

A resumed run therefore only needs its step, and processes agree on a batch without communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

LARGEST_LISTED = 2**22
"""Orders of more rows are computed on demand; shorter ones are held in memory."""
BLOCK_STEPS = 1000
"""In each block of this many steps every data set has its share."""
ROUNDS = 6
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # constants of splitmix64


def indices_of_step(step: int, *, num_rows: int, batch_size: int, seed: int, stream: int = 0) -> np.ndarray:
    """The rows ``int64[B]`` of a step's batch: all rows in every epoch, each time in a new order.

    ``stream``: the number of the data set, if several are read side by side.
    """
    epochs_B, places_B = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_rows)
    rows_B = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs_B).tolist():
        key = (seed, epoch, stream) if stream else (seed, epoch)
        is_of_epoch_B = epochs_B == epoch
        rows_B[is_of_epoch_B] = permuted(places_B[is_of_epoch_B], num_rows, key)
    return rows_B


def permuted(places_B: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """The elements at these places of a pseudo-random permutation of ``count`` numbers, given by ``key``, int64[B]."""
    return _listed(key, count)[places_B] if count <= LARGEST_LISTED else _computed(places_B, count, key)


@lru_cache(maxsize=4)
def _listed(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


def _computed(places_B: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """A Feistel network permutes the numbers below a power of four; results out of range are permuted again."""
    half = np.uint64(((count - 1).bit_length() + 1) // 2 or 1)
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng(key).integers(2**63, size=ROUNDS, dtype=np.uint64)
    values_B = places_B.astype(np.uint64)
    again_B = np.ones(len(values_B), bool)
    while again_B.any():
        left, right = values_B[again_B] >> half, values_B[again_B] & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & low)
        values_B[again_B] = left << half | right
        again_B = values_B >= count
    return values_B.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    for shift, factor in zip((30, 27), MIX, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """The order of one data set or several. Each batch comes from one data set, the same in all processes. So stage 1
    compares images of the same kind, and a data set's style does not give the answer away.

    ``sizes``: rows of each; ``weights``: their shares of the steps, 1 each by default. A *draw* is the number of a row,
    counted over all data sets, plus the number of all rows times the number of finished epochs of its data set.
    """

    sizes: tuple[int, ...]
    seed: int
    batch_size: int
    weights: tuple[float, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)

    def draws(self, step: int) -> np.ndarray:
        """int64[B]"""
        number, before = self._turn(step)
        size = self.sizes[number]
        rows_B = indices_of_step(
            before, num_rows=size, batch_size=self.batch_size, seed=self.seed, stream=number
        )
        epochs_B = np.arange(before * self.batch_size, (before + 1) * self.batch_size) // size
        first = [0, *accumulate(self.sizes)][number]
        return epochs_B * self.num_rows + first + rows_B

    def _turn(self, step: int) -> tuple[int, int]:
        """The data set of a step, and how many earlier steps it had."""
        if len(self.sizes) == 1:
            return 0, step
        block, place = divmod(step, BLOCK_STEPS)
        turns = np.random.default_rng([self.seed, block, len(self.sizes), 1]).permutation(self._turns)
        number = int(turns[place])
        before = block * np.count_nonzero(self._turns == number) + np.count_nonzero(turns[:place] == number)
        return number, int(before)

    @cached_property
    def _turns(self) -> np.ndarray:
        """The data sets of a block, each as often as its weight says (largest remainders), but at least once."""
        weights = np.array(self.weights or [1.0] * len(self.sizes))
        shares = weights / weights.sum() * BLOCK_STEPS
        counts = np.maximum(np.floor(shares).astype(int), 1)
        order = np.argsort(counts - shares, kind="stable")
        while (missing := BLOCK_STEPS - counts.sum()) > 0:
            counts[order[:missing]] += 1
        while counts.sum() > BLOCK_STEPS:
            counts[counts.argmax()] -= 1
        return np.repeat(np.arange(len(counts)), counts)
