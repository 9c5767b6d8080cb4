"""An image encoder that learns beside the Q-Former, and how large its pictures are.

B images, P patches and the tokens before them, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blip2.dropout import dropout_by_rows
from blip2.model import Blip2, Blip2Matcher
from blip2.train.group import Step
from blip2.train.recipes import VisionRecipe


def unfreeze(model: Blip2 | Blip2Matcher, recipe: VisionRecipe | None) -> None:
    """After `freeze_pretrained`: the image encoder learns as well, if the recipe says so."""
    if recipe is None or not recipe.learns:
        return
    model.vision.requires_grad_(True)
    if model.config.vision.rotary_base:  # its positions are turns, and what is added is zero
        model.vision.position_embedding.requires_grad_(False)


def rate_shares(model: Blip2 | Blip2Matcher, recipe: VisionRecipe | None) -> dict[str, float]:
    """Of the image encoder's parameters, by name, which part of the learning rate each learns at.

    With L blocks and decay d it is d^(L - i) for block i = 0, 1, ...; d^(L + 1) for what is before the blocks, and d
    for what is after them (``get_num_layer`` of ``eva_vit.py``). The norm that BLIP-2 adds is no part of the encoder.
    """
    if recipe is None or recipe.layer_decay == 1:
        return {}
    count, shares = model.config.vision.num_layers, {}
    for name, _ in model.vision.named_parameters():
        part, *rest = name.split(".")
        if part == "post_norm":
            continue
        block = int(rest[0]) if part == "blocks" else count - 1 if part in ("final_norm", "head") else -1
        shares[f"vision.{name}"] = recipe.layer_decay ** (count - block)
    return shares


def resize(model: Blip2 | Blip2Matcher, size: int) -> None:
    """Make it a model of pictures of ``size`` pixels, a multiple of the patches' side."""
    model.vision.resize(size)
    model.config = replace(model.config, vision=model.vision.config)


class Looks:
    """What the image encoder gives of the parts of a batch.

    Where it learns, a stage begins with ``features``, in whose ``.grad`` it leaves a gradient, and `learn` takes that
    on into the encoder. Of one part what was computed is kept until then; of several each is seen a second time, so
    that the activations of one are in memory and no more.
    """

    def __init__(
        self, see: Callable[[Tensor], Tensor], learns: bool, parts: Sequence[tuple[Tensor, Tensor]], step: Step
    ) -> None:
        """``see``: what is stored of pictures to features ``float[B, 1 + P, D]``; ``parts``: of each what is stored,
        and which rows ``int64[B]`` of the global batch they are."""

        def look(stored: Tensor, place_B: Tensor) -> Tensor:
            with step.autocast(), dropout_by_rows((step.seed, 5), place_B):
                return see(stored)

        self._look, self._parts, self._learns = look, parts, learns
        is_kept = learns and len(parts) == 1
        with torch.set_grad_enabled(is_kept):
            seen = [look(*part) for part in parts]
        self._kept = seen if is_kept else []
        self.features = [features_BPD.detach().requires_grad_(learns) for features_BPD in seen]

    def learn(self) -> None:
        """Add to ``.grad`` of the encoder's weights what the leaves' gradient makes of them."""
        if not self._learns:
            return
        for number, leaf_BPD in enumerate(self.features):
            features_BPD = self._kept[number] if self._kept else self._look(*self._parts[number])
            features_BPD.backward(leaf_BPD.grad)
