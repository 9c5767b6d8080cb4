"""Which layers of a model are quantised, and how their weights are called in a checkpoint.

A quantised weight ``a.b.weight`` is in the file as ``a.b.weight.codes`` and ``a.b.weight.scales``, as
`QuantizedLinear` has them; config.json says so under ``quantization_config``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from blip2.errors import OptionError
from blip2.quantized import BITS, GROUP_SIZES, QuantizedLinear

CODES, SCALES = "codes", "scales"
KINDS = {"int8": 8, "int4": 4}
PARTS = ("language", "vision")
OUTPUT = "language.output"  # T5's table of output tokens: 4 bits are too few for it, and it is small


@dataclass(frozen=True)
class Quantization:
    """``bits`` 8 or 4; ``group_size`` inputs share a scale (4 bits); the linear layers of ``parts``."""

    bits: int
    group_size: int = 64
    parts: tuple[str, ...] = ("language",)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"bits is {self.bits}; weights are quantised to 8 or 4 bits")
        if self.group_size not in GROUP_SIZES:
            raise OptionError(f"group_size is {self.group_size}; use one of {', '.join(map(str, GROUP_SIZES))}")
        if not self.parts or set(self.parts) - set(PARTS):
            raise OptionError(f"parts is {', '.join(self.parts) or 'empty'}; use {' or '.join(PARTS)}")

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"parts": list(self.parts)}


def quantization(kind: str | None, *, vision: bool = False, group_size: int = 64) -> Quantization | None:
    """From words: None, "int8" or "int4"; ``vision``: the image encoder as well."""
    if kind is None:
        if vision:
            raise OptionError("quantize_vision is set without quantize; say int8 or int4")
        return None
    if kind not in KINDS:
        raise OptionError(f"quantize is {kind!r}; use {' or '.join(KINDS)}")
    return Quantization(KINDS[kind], group_size, PARTS if vision else PARTS[:1])


def bits_of_layers(model: nn.Module, quantization: Quantization | None) -> dict[str, int]:
    """The linear layers that are quantised, by name, each with its bits; none of the Q-Former, ever."""
    if quantization is None:
        return {}
    return {
        name: 8 if name == OUTPUT else quantization.bits
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and name.split(".")[0] in quantization.parts
    }


def put_quantized_layers(model: nn.Module, quantization: Quantization | None) -> None:
    """Put an empty `QuantizedLinear` in the place of each layer that is to be quantised."""
    for name, bits in bits_of_layers(model, quantization).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and quantization is not None
        with torch.device("meta"):
            quantized = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                bits=bits,
                group_size=quantization.group_size,
                has_bias=linear.bias is not None,
            )
        model.set_submodule(name, quantized)
