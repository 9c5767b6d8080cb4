"""Stage 1: the Q-Former learns to see what texts speak of (section 3.1 and Figure 2 of the paper).

Three losses over one set of image features: image-text contrast (ITC), image-text matching (ITM), and
image-grounded text generation (ITG, here ``lm``).

B pairs, P patches, Q queries, T text tokens, D and E widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.errors import RecipeError
from blip2.model import Blip2Matcher, similarity
from blip2.train.losses import contrast, hard_negatives, language_modelling


class Stage1Losses(NamedTuple):
    """The three losses, and what they were computed from."""

    itc: Tensor
    itm: Tensor
    lm: Tensor
    similarity_BB: Tensor
    """Cosines, images by texts."""
    matching_N2: Tensor
    """Logits of 3B pairs: all right ones, wrong images, wrong texts."""


def losses(
    model: Blip2Matcher,
    features_BPD: Tensor,
    text_BT: Tensor,
    text_mask_BT: Tensor,
    *,
    picture_B: Tensor | None = None,
    generator: torch.Generator | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.1,
) -> Stage1Losses:
    """One training step's losses; to be summed.

    ``features_BPD`` float[B, 1 + P, D] are those before the image encoder's last norm. ``negatives`` gives the
    wrong image of each text and the wrong text of each image, ``int64[B]`` each; without, they are drawn.
    """
    if len(features_BPD) < 2:
        raise RecipeError("stage 1 needs at least two pairs in a batch: one alone has no wrong partner to be told from")
    assert model.temperature is not None
    patches_BPD = model.vision.post_norm(features_BPD.to(model.vision.post_norm.weight.dtype))
    text_mask_BT = text_mask_BT.bool()

    seen = model.qformer(image_BPD=patches_BPD)
    read = model.qformer(text_BT=text_BT, text_mask_BT=text_mask_BT)
    # Half precision would move a cosine by more than the temperature can bear.
    with torch.autocast(features_BPD.device.type, enabled=False):
        images_BQE = F.normalize(model.vision_projection(seen.hidden_BSD.float()), dim=-1)
        texts_BE = F.normalize(model.text_projection(read.hidden_BSD[:, 0].float()), dim=-1)
        similarity_BB = similarity(images_BQE, texts_BE)
        logits_BB = similarity_BB / model.temperature
    equal_BB = _equal(text_BT, text_mask_BT, picture_B)
    itc = contrast(logits_BB, equal_BB, label_smoothing)

    wrong_image_B, wrong_text_B = negatives or hard_negatives(logits_BB, equal_BB, generator)
    matching_N2 = model.match(
        torch.cat([patches_BPD, patches_BPD[wrong_image_B], patches_BPD]),
        torch.cat([text_BT, text_BT, text_BT[wrong_text_B]]),
        torch.cat([text_mask_BT, text_mask_BT, text_mask_BT[wrong_text_B]]),
    ).float()
    itm = F.cross_entropy(matching_N2, _is_match(matching_N2))

    lm = _generation(model, seen.memory, text_BT, text_mask_BT, label_smoothing)
    return Stage1Losses(itc, itm, lm, similarity_BB, matching_N2)


def _generation(
    model: Blip2Matcher,
    memory: list[tuple[Tensor, Tensor]],
    text_BT: Tensor,
    text_mask_BT: Tensor,
    label_smoothing: float,
) -> Tensor:
    """The text word by word, given the queries: they do not see the text, so their first pass is used again."""
    assert model.lm_head is not None and model.qformer.word_embedding is not None
    text_BT = text_BT.clone()
    text_BT[:, 0] = model.config.bos_token_id
    written = model.qformer(text_BT=text_BT, text_mask_BT=text_mask_BT, memory=memory)
    is_target_BT = text_mask_BT[:, 1:]
    hidden_ND = written.hidden_BSD[:, :-1][is_target_BT]
    logits_NV = model.lm_head(hidden_ND, model.qformer.word_embedding.weight)
    return language_modelling(logits_NV, text_BT[:, 1:][is_target_BT], label_smoothing)


def _is_match(matching_N2: Tensor) -> Tensor:
    """The labels of the 3B pairs: the first third is right."""
    label_N = torch.zeros(len(matching_N2), dtype=torch.long, device=matching_N2.device)
    label_N[: len(label_N) // 3] = 1
    return label_N


def _equal(text_BT: Tensor, text_mask_BT: Tensor, picture_B: Tensor | None) -> Tensor:
    """bool[B, B]: which pairs share their text or their picture, and so are no negatives of one another."""
    text_BT = text_BT.masked_fill(~text_mask_BT, -1)
    equal_BB = (text_BT[:, None] == text_BT[None]).all(dim=-1)
    return equal_BB if picture_B is None else equal_BB | (picture_B[:, None] == picture_B[None])


@torch.no_grad()
def scores(found: Stage1Losses) -> dict[str, float]:
    """How well the pairs of one batch are told apart: shares between 0 and 1.

    ``image_to_text`` and ``text_to_image``: the most similar of the batch is the right one. ``matching``: pairs,
    a third right and two thirds hard negatives, that are classified rightly.
    """
    own_B = torch.arange(len(found.similarity_BB), device=found.similarity_BB.device)
    is_right_N = found.matching_N2.argmax(dim=1) == _is_match(found.matching_N2)
    return {
        "image_to_text": (found.similarity_BB.argmax(dim=1) == own_B).float().mean().item(),
        "text_to_image": (found.similarity_BB.argmax(dim=0) == own_B).float().mean().item(),
        "matching": is_right_N.float().mean().item(),
    }
