"""Stage 1: the Q-Former learns visual features that are relevant to the text (section 3.1 and Figure 2 of the paper).

Three losses over the same image features: image-text contrast (ITC), image-text matching (ITM), and image-grounded text
generation (ITG, here ``lm``).

B pairs, P patches, Q query tokens, T text tokens, D and E widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.dropout import dropout_by_rows
from blip2.errors import RecipeError
from blip2.layers import without_autocast
from blip2.model import Blip2Matcher, similarity
from blip2.qformer import Memory
from blip2.train.group import Step, parts_of
from blip2.train.losses import (
    chances,
    contrast,
    contrast_sum,
    draw_negatives,
    hard_negatives,
    language_modelling,
)


class Stage1Losses(NamedTuple):
    """The three losses, and intermediate results for the scores."""

    itc: Tensor
    itm: Tensor
    lm: Tensor
    similarity_BB: Tensor
    """Cosines, images by texts."""
    matching_N2: Tensor
    """Logits of 3B pairs: the right pairs, wrong images, wrong texts."""


class Part(NamedTuple):
    """Some pairs of a batch, with their indices ``place_B`` in the global batch."""

    features_BPD: Tensor
    """Before the image encoder's last norm, ``float[B, 1 + P, D]``. If the encoder is trained, a leaf that requires a
    gradient."""
    text_BT: Tensor
    text_mask_BT: Tensor
    image_B: Tensor
    place_B: Tensor


class _Views(NamedTuple):
    """Queries and text of some pairs, computed separately: unit vectors, with the text at the last of V = Q + 1 places.

    ``image_keys``: cross-attention keys and values of the images for each layer, shared by all passes.
    """

    vectors_BVE: Tensor
    memory: Memory
    image_keys: Memory


def losses(
    model: Blip2Matcher,
    features_BPD: Tensor,
    text_BT: Tensor,
    text_mask_BT: Tensor,
    *,
    image_B: Tensor | None = None,
    generator: torch.Generator | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.1,
    num_parts: int = 1,
) -> Stage1Losses:
    """The losses of a batch; their sum is minimised. Training uses `backward` instead.

    ``features_BPD`` float[B, 1 + P, D]: before the image encoder's last norm. ``negatives``: the wrong image of each
    text and the wrong text of each image, ``int64[B]`` each; drawn if absent. The pairs go through the Q-Former in
    ``num_parts`` parts, which takes less memory where there is no gradient.
    """
    _check_pairs(len(features_BPD))
    assert model.temperature is not None
    text_mask_BT = text_mask_BT.bool()
    parts = [slice(rows.start, rows.stop) for rows in parts_of(range(len(text_BT)), num_parts)]
    count, vectors, lm = int(text_mask_BT[:, 1:].sum()), [], torch.zeros((), device=text_BT.device)
    for part in parts:
        views = _look_and_read(model, features_BPD[part], text_BT[part], text_mask_BT[part])
        lm = lm + _generation(model, views.memory, text_BT[part], text_mask_BT[part], label_smoothing, count)
        vectors.append(views.vectors_BVE)
    vectors_BVE = torch.cat(vectors)
    with without_autocast(features_BPD.device):
        similarity_BB = similarity(vectors_BVE[:, :-1], vectors_BVE[:, -1])
        logits_BB = similarity_BB / model.temperature
    equal_BB = _equal(text_BT, text_mask_BT, image_B)
    itc = contrast(logits_BB, equal_BB, label_smoothing)
    wrong_image_B, wrong_text_B = negatives or hard_negatives(logits_BB, equal_BB, generator)
    matching = [
        _match(
            model, _image_keys(model, features_BPD[part]), _image_keys(model, features_BPD[wrong_image_B[part]]),
            text_BT[part], text_mask_BT[part], text_BT[wrong_text_B[part]], text_mask_BT[wrong_text_B[part]],
        ).unflatten(0, (3, -1))
        for part in parts
    ]  # fmt: skip
    matching_N2 = torch.cat(matching, dim=1).flatten(0, 1)
    itm = F.cross_entropy(matching_N2, _is_match(matching_N2))
    return Stage1Losses(itc, itm, lm, similarity_BB, matching_N2)


def backward(
    model: Blip2Matcher, parts: Sequence[Part], step: Step, *, label_smoothing: float, itc: str, itm: bool = True,
    itg: bool = True,
) -> dict[str, Tensor]:
    """This process's share of a step's losses; adds its share of the gradient to ``.grad``.

    The sums over all processes are the losses and the gradient of the global batch, however it is divided. Only ITC
    compares pairs of different parts, by their vectors, and ITM draws negatives from all parts. With several parts the
    vectors are computed twice: for all pairs without a gradient, then part by part with ITC's gradient of the vectors
    (GradCache, Gao et al. 2021). ``itc``: see `own_logits`; ``itm`` and ``itg``: whether they are trained.
    """
    _check_pairs(step.batch_size)
    assert model.temperature is not None
    group, own = step.group, slice(step.share.start, step.share.stop)
    parts = _of_one_width(parts, group.most(max(part.text_BT.shape[1] for part in parts)))

    def view(part: Part) -> _Views:
        with step.autocast():
            return _look_and_read(model, part.features_BPD, part.text_BT, part.text_mask_BT, part.place_B, step)

    only = view(parts[0]) if len(parts) == 1 else None
    with torch.no_grad():
        found_NVE = only.vectors_BVE if only else torch.cat([view(part).vectors_BVE for part in parts])
    pairs_BX = group.gather(torch.cat([_packed(part) for part in parts]), step.batch_size)
    image_B, text_BT, mask_BT = pairs_BX[:, 0], pairs_BX[:, 1:].clamp(min=0), pairs_BX[:, 1:] >= 0
    equal_NB = _equal(text_BT, mask_BT, image_B, own)

    vectors_BVE = group.gather(found_NVE, step.batch_size).requires_grad_()
    to_text_NB, to_image_NB = own_logits(vectors_BVE, own, model.temperature, itc)
    contrast_share = contrast_sum(to_text_NB, to_image_NB, equal_NB, label_smoothing) / step.batch_size
    contrast_share.backward()
    assert vectors_BVE.grad is not None
    toward_NVE = group.sum(vectors_BVE.grad)[own]

    place_N = torch.cat([part.place_B for part in parts])
    chance_2N = chances(step.batch_size, place_N.device, step.generator)[:, own]
    wrong_image_N = draw_negatives(to_image_NB, equal_NB, place_N, chance_2N[0])
    wrong_text_N = draw_negatives(to_text_NB, equal_NB, place_N, chance_2N[1])
    wrong_NPD, wanted_B = None, list[int]()
    if itm and (only is None or group.size > 1):  # else the keys of all wrong images are there
        features_NPD = torch.cat([part.features_BPD.detach() for part in parts])
        wanted_B = group.gather(wrong_image_N, step.batch_size).tolist()
        wrong_NPD = group.fetch(features_NPD, wanted_B).requires_grad_(parts[0].features_BPD.requires_grad)

    count, start = int(mask_BT[:, 1:].sum()), 0
    shares = {name: torch.zeros_like(contrast_share) for name, learns in (("itm", itm), ("lm", itg)) if learns}
    for part in parts:
        here = slice(start, start := start + len(part.place_B))
        views = only or view(part)
        terms: dict[str, Tensor] = {}
        with step.autocast():
            if itm:
                wrong_image_B, wrong_B = wrong_image_N[here], wrong_text_N[here]
                if wrong_NPD is None:
                    wrong_keys = [(key[wrong_image_B], value[wrong_image_B]) for key, value in views.image_keys]
                else:
                    wrong_keys = _image_keys(model, wrong_NPD[here], wrong_image_B, step)
                rows_3B = torch.cat([part.place_B + kind * step.batch_size for kind in range(3)])
                with dropout_by_rows((step.seed, 2), rows_3B):
                    matching_N2 = _match(
                        model, views.image_keys, wrong_keys, part.text_BT, part.text_mask_BT, text_BT[wrong_B],
                        mask_BT[wrong_B],
                    )  # fmt: skip
                summed = F.cross_entropy(matching_N2, _is_match(matching_N2), reduction="sum")
                terms["itm"] = summed / (3 * step.batch_size)
            if itg:
                with dropout_by_rows((step.seed, 3), part.place_B):
                    terms["lm"] = _generation(
                        model, views.memory, part.text_BT, part.text_mask_BT, label_smoothing, count
                    )
        torch.autograd.backward([*terms.values(), views.vectors_BVE], [None] * len(terms) + [toward_NVE[here]])
        for name, loss in terms.items():
            shares[name] += loss.detach()
    if wrong_NPD is not None and wrong_NPD.grad is not None:  # an image is also a negative of other texts
        toward_NPD, start = group.return_rows(wrong_NPD.grad, wanted_B), 0
        for part in parts:
            assert part.features_BPD.grad is not None
            part.features_BPD.grad += toward_NPD[start : (start := start + len(part.place_B))]
    return {"itc": contrast_share.detach()} | shares


def own_logits(vectors_BVE: Tensor, own: slice, temperature: Tensor, itc: str) -> tuple[Tensor, Tensor]:
    """Logits of this process's images by all texts, and of its texts by all images: ``float[N, B]`` each.

    ``itc`` "lavis": the gradient reaches only the vectors of the rows, not those of the columns, as in the authors'
    code, which gathers the columns without a gradient. That is about half of the gradient.
    """
    columns_BVE = vectors_BVE if itc == "exact" else vectors_BVE.detach()
    to_text_NB = similarity(vectors_BVE[own, :-1], columns_BVE[:, -1])
    to_image_NB = similarity(columns_BVE[:, :-1], vectors_BVE[own, -1]).t()
    return to_text_NB / temperature, to_image_NB / temperature


def _check_pairs(count: int) -> None:
    if count < 2:
        raise RecipeError("stage 1 needs at least two pairs in a batch: a single pair has no negatives")


def _of_one_width(parts: Sequence[Part], width: int) -> list[Part]:
    """Pad all texts to the width of the global batch, so that dropout masks of a row have a fixed shape."""

    def wider(part: Part) -> Part:
        missing = width - part.text_BT.shape[1]
        return part._replace(
            text_BT=F.pad(part.text_BT, (0, missing)), text_mask_BT=F.pad(part.text_mask_BT.bool(), (0, missing))
        )

    return [wider(part) for part in parts]


def _packed(part: Part) -> Tensor:
    """What other processes need of the pairs, in one tensor: image numbers, then texts padded with -1."""
    return torch.cat([part.image_B[:, None], part.text_BT.masked_fill(~part.text_mask_BT, -1)], dim=1)


def _rows(step: Step | None, number: int, place_B: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if step is None or place_B is None else dropout_by_rows((step.seed, number), place_B)


def _image_keys(
    model: Blip2Matcher, features_BPD: Tensor, place_B: Tensor | None = None, step: Step | None = None
) -> Memory:
    """Cross-attention keys and values, computed once for all four passes over the images. Computing them in each pass
    would take about two fifths of a step with kept features at the published size (counted operations)."""
    with _rows(step, 4, place_B):
        return model.qformer.image_keys(model.vision.post_norm(features_BPD.to(model.vision.post_norm.weight.dtype)))


def _look_and_read(
    model: Blip2Matcher,
    features_BPD: Tensor,
    text_BT: Tensor,
    text_mask_BT: Tensor,
    place_B: Tensor | None = None,
    step: Step | None = None,
) -> _Views:
    image_keys = _image_keys(model, features_BPD, place_B, step)
    with _rows(step, 0, place_B):
        seen = model.qformer(image_keys=image_keys)
    with _rows(step, 1, place_B):
        read = model.qformer(text_BT=text_BT, text_mask_BT=text_mask_BT)
    # Half precision would change a cosine by more than the temperature tolerates.
    with without_autocast(features_BPD.device):
        images_BQE = F.normalize(model.vision_projection(seen.hidden_BSD.float()), dim=-1)
        text_B1E = F.normalize(model.text_projection(read.hidden_BSD[:, :1].float()), dim=-1)
        return _Views(torch.cat([images_BQE, text_B1E], dim=1), seen.memory, image_keys)


def _match(
    model: Blip2Matcher,
    keys: Memory,
    wrong_keys: Memory,
    text_BT: Tensor,
    text_mask_BT: Tensor,
    wrong_text_BT: Tensor,
    wrong_text_mask_BT: Tensor,
) -> Tensor:
    """Logits ``float[3B, 2]``: the right pairs, wrong images, wrong texts."""
    pairs = zip(keys, wrong_keys, strict=True)
    return model.match(
        None,
        torch.cat([text_BT, text_BT, wrong_text_BT]),
        torch.cat([text_mask_BT, text_mask_BT, wrong_text_mask_BT]),
        image_keys=[
            (torch.cat([key, wrong_key, key]), torch.cat([value, wrong_value, value]))
            for (key, value), (wrong_key, wrong_value) in pairs
        ],
    ).float()


def _generation(
    model: Blip2Matcher,
    memory: Memory,
    text_BT: Tensor,
    text_mask_BT: Tensor,
    label_smoothing: float,
    count: int,
) -> Tensor:
    """Loss of the text's tokens given the query tokens. The query tokens do not attend to the text, so their first pass
    is reused."""
    assert model.lm_head is not None and model.qformer.word_embedding is not None
    text_BT = text_BT.clone()
    text_BT[:, 0] = model.config.bos_token_id
    written = model.qformer(text_BT=text_BT, text_mask_BT=text_mask_BT, memory=memory)
    is_target_BT = text_mask_BT[:, 1:]
    hidden_ND = written.hidden_BSD[:, :-1][is_target_BT]
    logits_NV = model.lm_head(hidden_ND, model.qformer.word_embedding.weight)
    return language_modelling(logits_NV, text_BT[:, 1:][is_target_BT], label_smoothing, count=count)


def _is_match(matching_N2: Tensor) -> Tensor:
    """Labels of the 3B pairs: the first third matches."""
    label_N = torch.zeros(len(matching_N2), dtype=torch.long, device=matching_N2.device)
    label_N[: len(label_N) // 3] = 1
    return label_N


def _equal(
    text_BT: Tensor, text_mask_BT: Tensor, image_B: Tensor | None, own: slice = slice(None)
) -> Tensor:
    """Which pairs share text or image with this process's pairs and so are not negatives of them: ``bool[N, B]``."""
    text_BT = text_BT.masked_fill(~text_mask_BT, -1)
    equal_NB = (text_BT[own, None] == text_BT[None]).all(dim=-1)
    return equal_NB if image_B is None else equal_NB | (image_B[own, None] == image_B[None])


@torch.no_grad()
def scores(found: Stage1Losses) -> dict[str, float]:
    """Accuracies within one batch, between 0 and 1.

    ``image_to_text`` and ``text_to_image``: how often the most similar one is right. ``matching``: how many of the
    pairs (one third right, two thirds hard negatives) are classified correctly.
    """
    own_B = torch.arange(len(found.similarity_BB), device=found.similarity_BB.device)
    is_right_N = found.matching_N2.argmax(dim=1) == _is_match(found.matching_N2)
    return {
        "image_to_text": (found.similarity_BB.argmax(dim=1) == own_B).float().mean().item(),
        "text_to_image": (found.similarity_BB.argmax(dim=0) == own_B).float().mean().item(),
        "matching": is_right_N.float().mean().item(),
    }
