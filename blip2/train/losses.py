"""The losses of both stages, as plain functions of tensors.

B pairs, N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast(logits_BB: Tensor, equal_BB: Tensor, label_smoothing: float) -> Tensor:
    """Image-text contrast (section 3.1): find the text of each image and the image of each text, averaged.

    ``equal_BB`` bool[B, B], symmetric, True on the diagonal: pairs that share their picture or their text. They
    are right answers as much as each other (``image_id`` in the authors' fine-tuning); without any besides the
    diagonal this is cross-entropy with the labels 0 .. B-1.
    """
    target_BB = equal_BB.float() / equal_BB.sum(dim=1, keepdim=True)
    to_text = F.cross_entropy(logits_BB, target_BB, label_smoothing=label_smoothing)
    to_image = F.cross_entropy(logits_BB.t(), target_BB, label_smoothing=label_smoothing)
    return (to_text + to_image) / 2


@torch.no_grad()
def hard_negatives(logits_BB: Tensor, equal_BB: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """For each text a wrong image and for each image a wrong text, the likelier the more they resemble.

    ``logits_BB`` images by texts, divided by the temperature. Returns the numbers of the images ``int64[B]`` and
    of the texts ``int64[B]``. Where all that is in the batch is equal, whatever is not the pair itself is taken.
    """
    own_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    forbidden_BB = torch.where(equal_BB.all(dim=1, keepdim=True), own_BB, equal_BB)

    def draw(rows_BB: Tensor) -> Tensor:
        # What is NaN makes the loss NaN, which the loop tells of; on a GPU an impossible draw would end the process.
        chances_BB = rows_BB.float().nan_to_num().masked_fill(forbidden_BB, float("-inf")).softmax(dim=1)
        return torch.multinomial(chances_BB, 1, generator=generator)[:, 0]

    return draw(logits_BB.t()), draw(logits_BB)


def language_modelling(logits_NV: Tensor, target_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the next token, averaged over the tokens that are targets, in fp32."""
    return F.cross_entropy(logits_NV.float(), target_N, label_smoothing=label_smoothing)
