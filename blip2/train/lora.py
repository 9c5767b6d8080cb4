"""Low-rank adapters (LoRA, Hu et al. 2021): beside a frozen product W x, train s B A x with a small inner size r.

A is drawn at random and B is zero, so the model is unchanged at first. Adapters belong to the products of the published
files: where three of them are one layer here (q, k, v), each has its own adapter. Adapters are saved in `peft`'s format
for the reference's model, see `blip2.checkpoint.adapters`.

r rank, D inputs, N outputs of a product in the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.checkpoint.adapters import write_adapter
from blip2.checkpoint.keys import is_transposed, published_names, rows_of_parts, table
from blip2.checkpoint.quantize import OUTPUT
from blip2.checkpoint.tensors import named_tensors
from blip2.dropout import drop
from blip2.errors import RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.quantized import QuantizedLinear
from blip2.train.recipes import LoraRecipe

NAME = "lora"
"""Name of the adapters as a part of the trained model."""
OTHERS = ("vision", "language", NAME)
"""Everything else is the Q-Former, its projections and heads."""


class Change(nn.Module):
    """What the adapters add to the outputs of one layer. ``products``: the modules of the published files that make up
    the layer, each with its number of outputs; only the ``chosen`` ones have an adapter."""

    def __init__(
        self, products: dict[str, int], chosen: set[str], num_inputs: int, recipe: LoraRecipe, device: torch.device
    ) -> None:
        super().__init__()
        self.outputs = [(rows, name in chosen) for name, rows in products.items()]
        self.names = [name for name in products if name in chosen]
        self.scale = recipe.alpha / (math.sqrt(recipe.rank) if recipe.rslora else recipe.rank)
        self.dropout = recipe.dropout
        # Drawn on the CPU, so that all devices begin with the same values; initialised as in peft.
        firsts = [nn.init.kaiming_uniform_(torch.empty(recipe.rank, num_inputs), a=math.sqrt(5)) for _ in self.names]
        self.first = nn.ParameterList([first_rD.to(device) for first_rD in firsts])
        self.second = nn.ParameterList(
            [torch.zeros(products[name], recipe.rank, device=device) for name in self.names]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., outputs of the layer]``, in float32 unless autocast changes it."""
        x = drop(x.to(self.first[0].dtype), self.dropout, self.training)
        pairs = zip(self.first, self.second, strict=True)
        found = []
        for rows, is_chosen in self.outputs:
            if is_chosen:
                first_rD, second_Nr = next(pairs)
                found.append(F.linear(F.linear(x, first_rD), second_Nr) * self.scale)
            else:
                found.append(x.new_zeros(*x.shape[:-1], rows))
        return torch.cat([each.to(found[0].dtype) for each in found], dim=-1)

    def attach(self, layer: nn.Module) -> None:
        """Add the adapters' output to that of ``layer`` from now on."""
        layer.register_forward_hook(lambda _, inputs, out: out + self(inputs[0]).to(out.dtype))


def put(model: Blip2 | Blip2Matcher, recipe: LoraRecipe) -> nn.Module:
    """Add adapters to the layers that the recipe names, and freeze everything else that it does not train.

    Returns the module to be put into training mode. Raises RecipeError for targets that the model lacks.
    """
    is_learning = {name for name, each in model.named_parameters() if each.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe.trains_qformer and name in is_learning)
    products = dict(_products(model, recipe))
    chosen = {name for found in products.values() for name in found if _is_chosen(name, recipe)}
    for target in recipe.targets:
        if not any(_is_named(name, target) for name in chosen):
            known = sorted({name.rpartition(".")[2] for found in products.values() for name in found})
            raise RecipeError(
                f"lora.targets: the {' and the '.join(recipe.parts)} of this model has no {target}; it has "
                f"{', '.join(known)}"
            )
    changes = {}
    for ours, found in products.items():
        if not chosen.isdisjoint(found):
            layer = model.get_submodule(ours)
            assert isinstance(layer, nn.Linear | QuantizedLinear)
            device = next(iter([*layer.parameters(), *layer.buffers()])).device
            change = Change(found, chosen, layer.in_features, recipe, device)
            change.attach(layer)
            changes[ours.replace(".", "/")] = change
    adapters = nn.ModuleDict(changes)
    model.add_module(NAME, adapters)
    return nn.ModuleList([adapters, model.qformer]) if recipe.trains_qformer else adapters


def save(model: Blip2 | Blip2Matcher, folder: Path, recipe: LoraRecipe, start: str) -> None:
    """Write the adapters in `peft`'s format, and other trained weights whole. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    changes = [each for each in model.get_submodule(NAME).children() if isinstance(each, Change)]
    for change in changes:
        for name, first_rD, second_Nr in zip(change.names, change.first, change.second, strict=True):
            tensors |= {f"{name}.lora_A.weight": first_rD, f"{name}.lora_B.weight": second_Nr}
    names = table(model.config)
    learnt = {each for ours in names if _learns(model, ours) for each in published_names(names[ours])}
    whole = {name: tensor for name, tensor in named_tensors(model) if name in learnt}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": start, "inference_mode": True,
        "r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout, "use_rslora": recipe.rslora,
        "bias": "none", "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted(name for change in changes for name in change.names),
        "fan_in_fan_out": any(
            is_transposed(model.config, f"{ours.replace('/', '.')}.weight")
            for ours, _ in model.get_submodule(NAME).named_children()
        ),
    }  # fmt: skip
    write_adapter(folder, config, tensors | whole)


def _products(model: Blip2 | Blip2Matcher, recipe: LoraRecipe) -> Iterator[tuple[str, dict[str, int]]]:
    """The linear layers of the recipe's parts, each with the modules of the published files that make up its rows, in
    order."""
    for ours, theirs in table(model.config).items():
        name, _, last = ours.rpartition(".")
        if last != "weight" or part_of(name) not in recipe.parts or name == OUTPUT:
            continue
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear | QuantizedLinear):
            modules = [each.removesuffix(".weight") for each in published_names(theirs)]
            rows = rows_of_parts(model.config, ours, layer.out_features, len(modules))
            yield name, dict(zip(modules, rows, strict=True))


def part_of(name: str) -> str:
    """The part of the model that a parameter name belongs to: "vision", "language", "lora", or else "qformer"."""
    first = name.partition(".")[0]
    return first if first in OTHERS else "qformer"


def _is_chosen(name: str, recipe: LoraRecipe) -> bool:
    """By name. Without targets: every product inside the layers, so not the projections and heads."""
    if not recipe.targets:
        return any(word.isdigit() for word in name.split("."))
    return any(_is_named(name, target) for target in recipe.targets)


def _is_named(name: str, target: str) -> bool:
    """As `peft` compares: the whole name, or its last components."""
    return name == target or name.endswith(f".{target}")


def _learns(model: nn.Module, ours: str) -> bool:
    module, _, last = ours.rpartition(".")
    parameter = getattr(model.get_submodule(module), last, None)
    return isinstance(parameter, Tensor) and parameter.requires_grad
