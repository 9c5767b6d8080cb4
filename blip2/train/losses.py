"""The losses of both stages, as plain functions of tensors.

B pairs, N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast(logits_BB: Tensor, equal_BB: Tensor, label_smoothing: float) -> Tensor:
    """Image-text contrast (section 3.1): find the text of each image and the image of each text, averaged.

    ``equal_BB`` bool[B, B], symmetric, True on the diagonal: pairs with the same image or the same text. They count as
    equally correct (``image_id`` in the authors' fine-tuning). If only the diagonal is True, this is cross-entropy with
    the labels 0 .. B-1.
    """
    return contrast_sum(logits_BB, logits_BB.t(), equal_BB, label_smoothing) / len(logits_BB)


def contrast_sum(to_text_NB: Tensor, to_image_NB: Tensor, equal_NB: Tensor, label_smoothing: float) -> Tensor:
    """The loss of N of the B pairs, from the logits of their images by all texts and of their texts by all images.
    Summed, not averaged."""
    target_NB = equal_NB.float() / equal_NB.sum(dim=1, keepdim=True)
    to_text = F.cross_entropy(to_text_NB, target_NB, label_smoothing=label_smoothing, reduction="sum")
    to_image = F.cross_entropy(to_image_NB, target_NB, label_smoothing=label_smoothing, reduction="sum")
    return (to_text + to_image) / 2


@torch.no_grad()
def hard_negatives(logits_BB: Tensor, equal_BB: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A wrong image for each text and a wrong text for each image, drawn with a probability that grows with similarity.

    ``logits_BB`` images by texts, divided by the temperature. Returns the indices of the images ``int64[B]`` and of the
    texts ``int64[B]``. If all pairs of the batch are equal, any other pair is drawn.
    """
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    chance_2B = chances(len(logits_BB), logits_BB.device, generator)
    return (
        draw_negatives(logits_BB.t(), equal_BB, own_B, chance_2B[0]),
        draw_negatives(logits_BB, equal_BB, own_B, chance_2B[1]),
    )


def chances(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Random numbers from 0 to 1 that decide the wrong image and the wrong text of each pair: ``float64[2, B]``."""
    return torch.rand(2, count, device=device, generator=generator).double()  # 24 bits: never rounded to 1


@torch.no_grad()
def draw_negatives(logits_NB: Tensor, equal_NB: Tensor, own_N: Tensor, chance_N: Tensor) -> Tensor:
    """For N of the pairs, which have the indices ``own_N`` among all B, one pair each that is not equal: ``int64[N]``.

    A draw depends only on the pair's own logits and random number, so the result is the same in any process.
    """
    own_NB = own_N[:, None] == torch.arange(logits_NB.shape[1], device=own_N.device)
    forbidden_NB = torch.where(equal_NB.all(dim=1, keepdim=True), own_NB, equal_NB)
    # A NaN makes the loss NaN, which the loop reports; the drawn index has to be valid all the same.
    logits_NB = logits_NB.double().nan_to_num(posinf=1e30, neginf=-1e30).masked_fill(forbidden_NB, float("-inf"))
    sums_NB = logits_NB.softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(sums_NB, (chance_N * sums_NB[:, -1])[:, None], right=True)[:, 0]


def language_modelling(
    logits_NV: Tensor, target_N: Tensor, label_smoothing: float = 0.0, *, count: int | None = None
) -> Tensor:
    """Cross-entropy of the next token in fp32: the mean over the targets, or with ``count`` their share of the mean
    over a batch of ``count`` targets."""
    loss = F.cross_entropy(logits_NV.float(), target_N, label_smoothing=label_smoothing, reduction="sum")
    return loss / (len(target_N) if count is None else count)
