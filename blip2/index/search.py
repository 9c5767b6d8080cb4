"""The nearest of many vectors: exact, at about the speed of reading them once.

N images of R vectors of L numbers: for a text R is the number of queries, and the best of them counts (section 3.1 of
the paper); for an image, whose queries are compared each with its like, all of them are one long vector and R is 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2 import native
from blip2.index.rows import Rows, each

CHUNK_BYTES = 64_000_000
READ_BYTES = 4_000_000
"""So much is read at a time that it is still in a processor's cache when it is worked on."""
STRETCH = 1e-3
"""Rounding to half precision makes a vector longer or shorter by at most 2^-11 of its length; where its numbers are so
tiny that they are rounded more coarsely, by less than what this is above that."""


def nearest(
    vectors_NRL: Rows | Tensor, query_L: Tensor, number: int, *, length: float = 1.0
) -> tuple[list[float], list[int]]:
    """The ``number`` rows with the greatest max over R of the cosine: their scores, and which they are, best first.

    ``vectors_NRL`` float16, each L of this ``length`` before it was rounded; ``query_L`` float32. The scores are those
    of double precision, rounded to float32, and so are the ranks; among equals the lower row comes first.
    """
    # A product in half precision reads half the bytes of one in float32, and is not exact. So it only says who may be
    # among the best: whoever is not, by its largest possible error, is out; the others are computed again.
    unit_L = F.normalize(query_L.double(), dim=0)
    roughly_N, error = roughly(vectors_NRL, unit_L, length)
    number = min(number, len(roughly_N))
    # `number` rows truly reach the last of them less an error, so none below that by another error can be among them.
    last = np.partition(roughly_N, -number)[-number]
    rows = np.flatnonzero(~(roughly_N < last - 2 * error))  # so put, damage (not a number) is not passed over
    at_a_time = _num_rows(vectors_NRL, CHUNK_BYTES // 32)
    found = [exactly(vectors_NRL[rows[at : at + at_a_time]], unit_L) for at in range(0, len(rows), at_a_time)]
    scores = np.concatenate(found)
    order = np.argsort(np.where(np.isnan(scores), -np.inf, -scores), kind="stable")[:number]
    return scores[order].tolist(), rows[order].tolist()


def exactly(vectors_NRL: Tensor, unit_L: Tensor) -> np.ndarray:
    """The scores of all, ``float32[N]``, computed in double precision: the same wherever a row stands."""
    # By numpy, as all that is small here: where other work has the processors, torch's threads wait for each other
    # longer than the work takes.
    wide_NRL = vectors_NRL.numpy().astype(np.float64)
    length_NR = np.sqrt(np.square(wide_NRL).sum(axis=-1)).clip(min=1e-9)
    return ((wide_NRL * unit_L.numpy()).sum(axis=-1) / length_NR).max(axis=1).astype(np.float32)


def roughly(vectors_NRL: Rows | Tensor, unit_L: Tensor, length: float) -> tuple[np.ndarray, float]:
    """Scores ``float32[N]`` by products in half precision, and how far the worst of them may be off.

    Four things are rounded. The query, to half precision: by Cauchy-Schwarz that moves a product by at most its
    error's length times the row's. The sum, which is added up in float32 in whatever order: by at most L * 2^-24 of
    the lengths' product (Higham, 2002, section 3.1), doubled here for terms of second order. The result, by torch, to
    half precision: by at most 2^-11 of itself, or 2^-25 where it is tiny. And the row, when it was stored: a cosine is
    its product divided by a length that is not quite ``length``. The maximum of R is off by no more than they are.
    """
    query_L = unit_L / length
    half_L = query_L.half()
    products = each(vectors_NRL, lambda some_NRL: _greatest(some_NRL, half_L), _num_rows(vectors_NRL, READ_BYTES // 2))
    roughly_N = torch.cat(list(products)).numpy()
    query_error = float((query_L - half_L.double()).norm())
    sum_error = 2 * len(half_L) * 2**-24 * float(half_L.double().norm())
    largest = float(np.abs(np.nan_to_num(roughly_N, posinf=0, neginf=0)).max())
    error = length * (query_error + sum_error) + 2**-11 * largest + 2**-25 + STRETCH * largest
    return roughly_N, (1 + STRETCH) * error


def _greatest(vectors_NRL: Tensor, half_L: Tensor) -> Tensor:
    """By the kernel, or by torch, which takes twice as long."""
    greatest_N = native.greatest(vectors_NRL, half_L.float())
    if greatest_N is not None:
        return greatest_N
    products = torch.mv(vectors_NRL.reshape(-1, len(half_L)), half_L)
    return products.float().view(vectors_NRL.shape[:2]).amax(dim=1)


def _num_rows(vectors_NRL: Rows | Tensor, numbers: int) -> int:
    """Rows of so many numbers together, at least one."""
    return max(1, numbers // math.prod(vectors_NRL.shape[1:]))
