"""Exact nearest neighbours, at about the speed of reading all vectors once.

N images of R vectors of L numbers: for a text R is the number of query tokens, and the best of them counts (section 3.1
of the paper). For an image, corresponding query tokens are compared, so all of them are one long vector and R is 1.
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
"""Bytes read at a time, so that they are still in the processor's cache when they are used."""
STRETCH = 1e-3
"""Rounding to half precision changes the length of a vector by at most a factor of 2^-11. Where its numbers are so
small that rounding is coarser, the difference between this and 2^-11 is more than enough."""


def nearest(
    vectors_NRL: Rows | Tensor, query_L: Tensor, number: int, *, length: float = 1.0
) -> tuple[list[float], list[int]]:
    """The ``number`` rows with the greatest max over R of the cosine: their scores and row numbers, best first.

    ``vectors_NRL`` float16, each of this ``length`` before rounding; ``query_L`` float32. Scores and ranks are those of
    double precision, rounded to float32; among equals the lower row comes first.
    """
    # Products in half precision read half the bytes of float32, but are inexact. So they only exclude rows that cannot
    # be among the best, given the largest possible error. The others are computed again in double precision.
    unit_L = F.normalize(query_L.double(), dim=0)
    roughly_N, error = roughly(vectors_NRL, unit_L, length)
    number = min(number, len(roughly_N))
    # `number` rows truly reach the last score minus the error, so rows below that by another error are excluded.
    last = np.partition(roughly_N, -number)[-number]
    rows = np.flatnonzero(~(roughly_N < last - 2 * error))  # written so that NaN, from damage, is not excluded
    at_a_time = _num_rows(vectors_NRL, CHUNK_BYTES // 32)
    found = [exactly(vectors_NRL[rows[at : at + at_a_time]], unit_L) for at in range(0, len(rows), at_a_time)]
    scores = np.concatenate(found)
    order = np.argsort(np.where(np.isnan(scores), -np.inf, -scores), kind="stable")[:number]
    return scores[order].tolist(), rows[order].tolist()


def exactly(vectors_NRL: Tensor, unit_L: Tensor) -> np.ndarray:
    """The scores of all, ``float32[N]``, in double precision: independent of a row's position."""
    # With numpy, as for all small arrays here: if the processors are busy with other work, torch's threads wait for
    # each other longer than the computation takes.
    wide_NRL = vectors_NRL.numpy().astype(np.float64)
    length_NR = np.sqrt(np.square(wide_NRL).sum(axis=-1)).clip(min=1e-9)
    return ((wide_NRL * unit_L.numpy()).sum(axis=-1) / length_NR).max(axis=1).astype(np.float32)


def roughly(vectors_NRL: Rows | Tensor, unit_L: Tensor, length: float) -> tuple[np.ndarray, float]:
    """Scores ``float32[N]`` from products in half precision, and a bound of their error.

    Four things are rounded. The query, to half precision: by Cauchy-Schwarz this changes a product by at most the
    error's length times the row's. The sum, added up in float32 in any order: by at most L * 2^-24 of the lengths'
    product (Higham, 2002, section 3.1), doubled here for second-order terms. The result, by torch, to half precision:
    by at most 2^-11 of itself, or 2^-25 where it is tiny. And the stored row: a cosine is its product divided by a
    length that is not exactly ``length``. The error of the maximum over R is not larger.
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
    """With the kernel, or else with torch, which takes twice as long."""
    greatest_N = native.greatest(vectors_NRL, half_L.float())
    if greatest_N is not None:
        return greatest_N
    products = torch.mv(vectors_NRL.reshape(-1, len(half_L)), half_L)
    return products.float().view(vectors_NRL.shape[:2]).amax(dim=1)


def _num_rows(vectors_NRL: Rows | Tensor, numbers: int) -> int:
    """Rows that have so many numbers in total, at least one."""
    return max(1, numbers // math.prod(vectors_NRL.shape[1:]))
