"""Near-duplicates: all pairs above a threshold, without comparing every pair in full."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.index.rows import Rows, each

BLOCK = 1024
"""Rows per block; blocks are compared with blocks."""
SAMPLE = 1024
DIRECTIONS = 512
"""Number of directions for the first comparison: the principal ones of a sample of the images."""


def groups(vectors_NL: Rows | Tensor, threshold: float) -> list[tuple[float, list[int]]]:
    """Rows connected by pairs with a cosine of at least ``threshold``: each group with its greatest cosine.

    ``vectors_NL`` float16. Exact: a pair counts by its cosine in double precision, rounded to float32. Sorted by the
    greatest cosine, descending.
    """
    best_N = torch.full((len(vectors_NL),), -torch.inf, dtype=torch.float32)
    group_N = torch.arange(len(vectors_NL))
    for first_B, second_B, product_B in _pairs(vectors_NL, threshold):
        for side_B in (first_B, second_B):
            best_N.scatter_reduce_(0, side_B, product_B, "amax")
        group_N = _joined(group_N, first_B, second_B)
    members: dict[int, list[int]] = {}
    for row in (best_N > -torch.inf).nonzero()[:, 0].tolist():
        members.setdefault(int(group_N[row]), []).append(row)
    found = [(float(best_N[rows].max()), rows) for rows in members.values()]
    return sorted(found, key=lambda group: (-group[0], group[1]))


def _joined(group_N: Tensor, first_B: Tensor, second_B: Tensor) -> Tensor:
    """The group of each row, identified by its lowest row, after joining these pairs."""
    while True:
        one_B, other_B = group_N[first_B], group_N[second_B]
        if torch.equal(one_B, other_B):
            return group_N
        group_N = group_N.scatter_reduce(0, torch.maximum(one_B, other_B), torch.minimum(one_B, other_B), "amin")
        while not torch.equal(group_N, further_N := group_N[group_N]):
            group_N = further_N


def _pairs(vectors_NL: Rows | Tensor, threshold: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair of rows above the threshold once, in portions: the two rows, and their cosine in float32.

    Let W be orthonormal directions, and a' the rest of a. Then <a, b> = <Wa, Wb> + <a', b'>, which by Cauchy-Schwarz is
    at most <Wa, Wb> + |a'| |b'|: one product of the projections extended by the length of the rest. Only pairs for
    which this bound reaches the threshold are compared in full.
    """
    projected_NW, length_N = _projected(vectors_NL)
    # Higham, 2002, section 3.1: the error of a float32 sum of L products, doubled for second-order terms.
    slack = 2 * vectors_NL.shape[1] * 2**-24
    starts = range(0, len(vectors_NL), BLOCK)
    for start in starts:
        for other in starts[start // BLOCK :]:
            bound_BB = projected_NW[start : start + BLOCK] @ projected_NW[other : other + BLOCK].T
            is_near_BB = ~(bound_BB < threshold - slack)
            first_P, second_P = (is_near_BB.triu(1) if start == other else is_near_BB).nonzero().T
            if not len(first_P):
                continue
            yield _compared(vectors_NL, length_N, start + first_P, other + second_P, threshold, slack)


def _compared(
    vectors_NL: Rows | Tensor, length_N: Tensor, first_P: Tensor, second_P: Tensor, threshold: float, slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that are above the threshold, compared in full: at most a block with a block."""
    (rows_F, at_P), (others_S, other_at_P) = (side.unique(return_inverse=True) for side in (first_P, second_P))
    cosine_P = (vectors_NL[rows_F].float() @ vectors_NL[others_S].float().T)[at_P, other_at_P]
    cosine_P /= length_N[first_P] * length_N[second_P]
    # Double precision decides where float32 cannot tell on which side of the threshold a pair is.
    for some in ((cosine_P - threshold).abs() < slack).nonzero()[:, 0].split(256):
        one_PL, two_PL = vectors_NL[first_P[some]].double(), vectors_NL[second_P[some]].double()
        cosine_P[some] = F.cosine_similarity(one_PL, two_PL).float()
    is_kept_P = cosine_P >= threshold
    return first_P[is_kept_P], second_P[is_kept_P], cosine_P[is_kept_P].clamp(max=1.0)


def _projected(vectors_NL: Rows | Tensor) -> tuple[Tensor, Tensor]:
    """Of each normalised row, the projection on the directions and the length of the rest; and the row's length."""
    number = len(vectors_NL)
    sample_SL = vectors_NL[torch.linspace(0, number - 1, min(SAMPLE, number)).round().long()].float()
    _, vectors_SS = torch.linalg.eigh(sample_SL @ sample_SL.T)  # the largest eigenvalue last
    directions_LW, _ = torch.linalg.qr(sample_SL.T @ vectors_SS[:, -DIRECTIONS:])

    def along(some_BL: Tensor) -> tuple[Tensor, Tensor]:
        length_B1 = some_BL.float().norm(dim=1, keepdim=True)
        unit_BW = some_BL.float() @ directions_LW / length_B1
        # Round up a little, since the difference to 1 is inexact where it is small.
        rest_B1 = (1 - unit_BW.square().sum(dim=1, keepdim=True)).clamp(min=0).add(1e-6).sqrt()
        return torch.cat([unit_BW, rest_B1], dim=1), length_B1[:, 0]

    projected, lengths = zip(*each(vectors_NL, along, BLOCK), strict=True)
    return torch.cat(projected), torch.cat(lengths)
