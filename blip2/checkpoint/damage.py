"""Explains NaN or infinite results after they occurred, so that loading need not check every weight."""

from __future__ import annotations

import torch

from blip2.checkpoint.keys import published_names, rows_of_parts
from blip2.checkpoint.quantize import SCALES, quantization_of
from blip2.checkpoint.tensors import names_in_files
from blip2.finite import first_not_finite, is_finite, overflow
from blip2.linear import readable
from blip2.model import Blip2, Blip2Matcher


def damage(model: Blip2 | Blip2Matcher) -> str | None:
    """Names the weights that are NaN or infinite, here and in files, and what to do; None if there are none.

    Reads all weights up to those.
    """
    name = first_not_finite(model)
    if name is None:
        return None
    module_name, _, last = name.rpartition(".")
    tensor = readable(getattr(model.get_submodule(module_name), last))
    stored = names_in_files(model, model.config, quantization_of(model)).get(name, name)
    names = [stored] if last == SCALES else published_names(stored)
    parts = tensor.split(rows_of_parts(model.config, name, len(tensor), len(names))) if len(names) > 1 else [tensor]
    stored = next(part_name for part_name, part in zip(names, parts, strict=True) if not is_finite(part))
    called = name if stored == name else f"{name} (in files: {stored})"
    if tensor.dtype == torch.float16:
        return f"{called} has such values: it is damaged, or overflows in float16; load the model in bfloat16"
    return f"{called} has such values: the model is damaged, download it again"


def why_not_finite(model: Blip2 | Blip2Matcher) -> str:
    """`damage`, or else that the computation overflows."""
    return damage(model) or overflow(model.vision.patch_embedding.weight.dtype)
