"""Builds the model that a training starts from, with parts from other models and for the recipe's image size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from blip2 import checkpoint
from blip2.config import Blip2Config
from blip2.data.features import fingerprint
from blip2.errors import CheckpointError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.qformer import QFormer
from blip2.train.check import Materials, check_weights
from blip2.train.recipes import Recipe
from blip2.train.seeing import resize


def build(
    recipe: Recipe, path: Path, materials: Materials, *, device: torch.device, dtype: torch.dtype
) -> Blip2 | Blip2Matcher:
    """The model of the recipe at ``path``, with frozen parts in ``dtype`` unless the recipe says otherwise.

    Raises RecipeError and CheckpointError for weights that cannot be trained or do not fit together.
    """
    base = "auto" if recipe.lora is None else recipe.lora.base
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(base, dtype)
    quantize = base if base in ("int8", "int4") else None
    # Trained weights keep the full precision of the file, since updates are small.
    vision_dtype = torch.float32 if recipe.vision is not None and recipe.vision.learns else None
    model = checkpoint.load(
        materials.start, device=device, dtype=dtype, vision_dtype=vision_dtype, quantize=quantize
    )
    if materials.qformer is not None:
        assert isinstance(model, Blip2)
        take_qformer(model, materials.qformer, dtype=dtype)
    if materials.text_branch is not None:
        assert isinstance(model, Blip2) and isinstance(materials.config, Blip2Config)
        take_text_branch(model, materials.text_branch, materials.config)
    if materials.config.vision != model.config.vision:
        resize(model, materials.config.vision.image_size)
    if (damage := checkpoint.damage(model)) is not None:
        raise CheckpointError(f"{path}: start: {materials.start} has weights that are NaN or infinite: {damage}")
    check_weights(model, (recipe.start, recipe.qformer))
    return model


def take_qformer(model: Blip2, folder: Path, *, dtype: torch.dtype) -> None:
    """Copy the Q-Former of a stage-1 model, without its text branch, and the norm of the patch features into ``model``.

    Raises RecipeError if the two do not fit together.
    """
    source = checkpoint.load(folder, dtype=dtype)
    assert isinstance(source, Blip2Matcher)
    if fingerprint(source.vision) != fingerprint(model.vision):
        raise RecipeError(f"qformer: {folder} was trained with another image encoder than that of 'start'")
    _copy(source.qformer, model.qformer, folder, "qformer")
    _copy(source.vision.post_norm, model.vision.post_norm, folder, "qformer")


def take_text_branch(model: Blip2, folder: Path, config: Blip2Config) -> None:
    """Add the text branch of a stage-1 model to ``model`` and keep its query branch; ``config`` is the new
    configuration.

    Stage 2 drops the text branch, but continues to train the self-attention that both branches share. The text branch
    is that of stage 1, as the authors say of theirs (salesforce/LAVIS, issue 344).
    """
    source = checkpoint.load(folder)
    assert isinstance(source, Blip2Matcher)
    before = model.qformer
    qformer = QFormer(config.qformer).to(before.query_tokens).eval()
    _copy(source.qformer, qformer, folder, "text_branch")
    qformer.load_state_dict(before.state_dict(), strict=False)
    model.qformer = qformer
    model.config = replace(model.config, qformer=config.qformer)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, folder: Path, key: str) -> None:
    found = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            have = list(found[name].shape) if name in found else "absent"
            raise RecipeError(f"{key}: {name} has shape {have} in {folder}, but {list(parameter.shape)} in the model "
                "of 'start'")
        parameter.copy_(found[name])
