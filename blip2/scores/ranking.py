"""Retrieval recall in both directions, and Winoground's three scores.

N images, M texts, each of which belongs to one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def ranks(scores_NM: np.ndarray, owner_M: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rank, from 0, of the first right result: for each image among the texts, ``int[N]``, and for each text among
    the images, ``int[M]``.

    Ranks as the authors' library (``_report_metrics``): by score, of equal ones the later one first.
    """
    owners = np.asarray(owner_M)
    texts_before = np.full(len(scores_NM), scores_NM.shape[1])
    for image, row_M in enumerate(scores_NM):
        own = np.flatnonzero(owners == image)
        if len(own):
            texts_before[image] = min(_before(row_M, int(text)) for text in own)
    scores_MN = np.ascontiguousarray(scores_NM.T)
    images_before = np.array([_before(row_N, int(owner)) for row_N, owner in zip(scores_MN, owners, strict=True)])
    return texts_before, images_before


def _before(scores: np.ndarray, place: int) -> int:
    better = int((scores > scores[place]).sum())
    return better + int((scores[place + 1 :] == scores[place]).sum())


def pairs(scores: Sequence[Sequence[float]]) -> tuple[bool, bool, bool]:
    """Of two images with two texts, ``scores[image][text]``: whether each image selects its own text, each text its own
    image, and both (Thrush et al., 2022). Equal scores are wrong."""
    (right_0, wrong_0), (wrong_1, right_1) = scores
    text = right_0 > wrong_0 and right_1 > wrong_1
    image = right_0 > wrong_1 and right_1 > wrong_0
    return text, image, text and image
