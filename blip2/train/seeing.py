"""Training of the image encoder, and the size of its images.

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
    """After `freeze_pretrained`: make the image encoder trainable if the recipe says so."""
    if recipe is None or not recipe.learns:
        return
    model.vision.requires_grad_(True)
    if model.config.vision.rotary_base:  # rotary positions; the added ones are zero
        model.vision.position_embedding.requires_grad_(False)


def rate_shares(model: Blip2 | Blip2Matcher, recipe: VisionRecipe | None) -> dict[str, float]:
    """Factor of the learning rate for each parameter of the image encoder, by name.

    With L blocks and decay d it is d^(L - i) for block i = 0, 1, ...; d^(L + 1) for everything before the blocks, and d
    for everything after them (``get_num_layer`` of ``eva_vit.py``). The norm that BLIP-2 adds does not belong to the
    encoder.
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
    """Change the model to images of ``size`` pixels, a multiple of the patch size."""
    model.vision.resize(size)
    model.config = replace(model.config, vision=model.vision.config)


class EncodedParts:
    """The image encoder's features of the parts of a batch.

    If the encoder is trained, a stage starts from ``features``, leaves a gradient in their ``.grad``, and `backward`
    continues into the encoder. With a single part its activations are kept until then. With several parts each is
    encoded a second time, so that the activations of only one part are in memory.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], learns: bool, parts: Sequence[tuple[Tensor, Tensor]], step: Step
    ) -> None:
        """``encode``: from what is stored of images to features ``float[B, 1 + P, D]``; ``parts``: for each part what
        is stored, and the indices ``int64[B]`` of its rows in the global batch."""

        def run(stored: Tensor, place_B: Tensor) -> Tensor:
            with step.autocast(), dropout_by_rows((step.seed, 5), place_B):
                return encode(stored)

        self._run, self._parts, self._learns = run, parts, learns
        keeps = learns and len(parts) == 1
        with torch.set_grad_enabled(keeps):
            encoded = [run(*part) for part in parts]
        self._kept = encoded if keeps else []
        self.features = [features_BPD.detach().requires_grad_(learns) for features_BPD in encoded]

    def backward(self) -> None:
        """Continue the backward pass from ``features`` into the encoder's weights."""
        if not self._learns:
            return
        for number, leaf_BPD in enumerate(self.features):
            features_BPD = self._kept[number] if self._kept else self._run(*self._parts[number])
            features_BPD.backward(leaf_BPD.grad)
