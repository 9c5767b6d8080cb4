"""Scores of what is found: recall of a retrieval in both directions, and Winoground's three.

N pictures, M texts, of which each belongs to one picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def ranks(scores_NM: np.ndarray, owner_M: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many stand before the first that is right: of each picture among the texts, ``int[N]``, and of each text
    among the pictures, ``int[M]``.

    As the authors' library ranks (``_report_metrics``): by the score, of equals the later one first.
    """
    owners = np.asarray(owner_M)
    texts_before = np.full(len(scores_NM), scores_NM.shape[1])
    for picture, row_M in enumerate(scores_NM):
        own = np.flatnonzero(owners == picture)
        if len(own):
            texts_before[picture] = min(_before(row_M, int(text)) for text in own)
    scores_MN = np.ascontiguousarray(scores_NM.T)
    pictures_before = np.array([_before(row_N, int(owner)) for row_N, owner in zip(scores_MN, owners, strict=True)])
    return texts_before, pictures_before


def _before(scores: np.ndarray, place: int) -> int:
    better = int((scores > scores[place]).sum())
    return better + int((scores[place + 1 :] == scores[place]).sum())


def pairs(scores: Sequence[Sequence[float]]) -> tuple[bool, bool, bool]:
    """Of two pictures with two texts, ``scores[picture][text]``: whether each picture has its own text, each text its
    own picture, and both (Thrush et al., 2022). Equal scores are wrong."""
    (right_0, wrong_0), (wrong_1, right_1) = scores
    text = right_0 > wrong_0 and right_1 > wrong_1
    picture = right_0 > wrong_1 and right_1 > wrong_0
    return text, picture, text and picture
