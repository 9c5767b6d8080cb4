"""``load_adapter``: merge an adapter of `peft` into the weights of a loaded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2.checkpoint.adapters import Adapters
from blip2.compat.names import put_weight
from blip2.errors import OptionError
from blip2.linear import readable


@torch.no_grad()
def merge(model: Any, name: str | Path, weight: float) -> None:
    """Add ``weight`` times an adapter to the model's weights, each computed in float32 and cast back to its dtype.

    Raises CheckpointError if it is not an adapter or belongs to another model; OptionError for a quantised model.
    """
    if model.is_quantized:
        raise OptionError(
            "the model is quantised, and an adapter has to be merged before; from_pretrained(name, adapter=..., "
            "load_in_8bit=True)"
        )
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for last, _ in module.named_parameters(recurse=False):
            owners[f"{path}.{last}" if path else last] = (module, last)
    weights = {full: getattr(module, last) for full, (module, last) in owners.items()}
    embedded = {id(module.weight) for module, _ in owners.values() if isinstance(module, nn.Embedding)}
    tables = {full for full, weight in weights.items() if id(weight) in embedded}  # also a tied head
    shapes = {full: tuple(weight.shape) for full, weight in weights.items()}
    adapters = Adapters.of({name: weight})
    assert adapters is not None
    adapters = adapters.fitted(shapes, tables, Path(model.name_or_path or type(model).__name__))
    for full in {full for adapter in adapters for full in adapter.changes}:
        module, last = owners[full]
        before = readable(weights[full].detach())
        put_weight(module, adapters.merged({full: len(before)}, before).to(before.dtype), last)
    model.model.config = replace(model.model.config, adapted=adapters.digest or model.model.config.adapted)
