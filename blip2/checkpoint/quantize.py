"""Which linear layers of a model are quantised, and how their weights are called in a checkpoint.

A quantised weight ``a.b.weight`` is in the file as ``a.b.weight.codes`` and ``a.b.weight.scales``, as
`QuantizedLinear` has them; config.json says so under ``quantization_config``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from blip2.checkpoint.settings import read_quantization
from blip2.errors import OptionError, option, setting
from blip2.language import OPT
from blip2.model import Blip2
from blip2.quantized import BITS, GROUP_SIZES, QuantizedLinear

CODES, SCALES = "codes", "scales"
KINDS = {"int8": 8, "int4": 4}
PARTS = ("language", "vision")
OUTPUT = "language.output"  # the scores of all tokens: 4 bits are too few for them, and it is small


@dataclass(frozen=True)
class Quantization:
    """``bits`` 8 or 4; ``group_size`` inputs share a scale (4 bits); the linear layers of ``parts``."""

    bits: int
    group_size: int = 64
    parts: tuple[str, ...] = ("language",)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"{option('bits')} is {self.bits}; weights are quantised to 8 or 4 bits")
        if self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise OptionError(f"{option('group_size')} is {self.group_size}; use one of {sizes}")
        if not self.parts or set(self.parts) - set(PARTS):
            raise OptionError(f"parts is {', '.join(self.parts) or 'empty'}; use {' or '.join(PARTS)}")

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"parts": list(self.parts)}


def quantization(kind: str | None, *, vision: bool = False, group_size: int = 64) -> Quantization | None:
    """From words: None, "int8" or "int4"; ``vision``: the image encoder as well."""
    if kind is None:
        if vision:
            raise OptionError(
                f"{option('quantize_vision')} is set without {option('quantize')}; {setting('quantize', 'int8')}, or "
                "int4"
            )
        return None
    if kind not in KINDS:
        raise OptionError(f"{option('quantize')} is {kind!r}; use {' or '.join(KINDS)}")
    return Quantization(KINDS[kind], group_size, PARTS if vision else PARTS[:1])


def quantization_in(folder: Path, asked: Quantization | None = None) -> Quantization | None:
    """How the weights in a folder are quantised, or are to be: `OptionError` if both, and not the same."""
    found = read_quantization(folder)
    if found is None:
        return asked
    stored = Quantization(found["bits"], found["group_size"], tuple(found["parts"]))
    if asked not in (None, stored):
        raise OptionError(f"{folder} is quantised to {stored.bits} bits already; take it as it is, or the original")
    return stored


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a loaded model is quantised; None if it is not."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if not layers:
        return None
    lowest = min(layers.values(), key=lambda layer: layer.bits)
    parts = tuple(part for part in PARTS if any(name.startswith(f"{part}.") for name in layers))
    return Quantization(lowest.bits, lowest.group_size if lowest.bits == 4 else 64, parts)


def bits_of_layers(model: nn.Module, quantization: Quantization | None) -> dict[str, int]:
    """The linear layers that are quantised, by name, each with its bits; none of the Q-Former, ever."""
    if quantization is None:
        return {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)]
    if has_table_as_head(model) and OUTPUT not in names:
        names.append(OUTPUT)
    chosen = [name for name in names if name.split(".")[0] in quantization.parts]
    return {name: 8 if name == OUTPUT else quantization.bits for name in chosen}


def put_linears(model: nn.Module, quantization: Quantization | None) -> None:
    """Put a stand-in, still empty, in the place of each linear layer that is quantised.

    The head of an OPT is its table of tokens; where it would be quantised it is so beside the table.
    """
    quantized = bits_of_layers(model, quantization)

    def stand_in(name: str, num_inputs: int, num_outputs: int, has_bias: bool) -> QuantizedLinear:
        assert quantization is not None
        bits, group_size = quantized[name], quantization.group_size
        with torch.device("meta"):
            return QuantizedLinear(num_inputs, num_outputs, bits=bits, group_size=group_size, has_bias=has_bias)

    for name, linear in list(model.named_modules()):
        if name in quantized and isinstance(linear, nn.Linear):
            instead = stand_in(name, linear.in_features, linear.out_features, linear.bias is not None)
            model.set_submodule(name, instead)
    if has_table_as_head(model):
        num_tokens, width = model.language.token_embedding.weight.shape
        model.language.output = stand_in(OUTPUT, width, num_tokens, False) if OUTPUT in quantized else None


def has_table_as_head(model: nn.Module) -> TypeGuard[Blip2]:
    return isinstance(model, Blip2) and isinstance(model.language, OPT)
