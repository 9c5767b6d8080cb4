"""Which linear layers of a model are quantised, and the names of their weights in a checkpoint.

A quantised weight ``a.b.weight`` is stored as ``a.b.weight.codes`` and ``a.b.weight.scales``, as in `QuantizedLinear`;
config.json describes it under ``quantization_config``.

There are two kinds: weights of fewer bits, which save memory, in the language model and optionally in the image
encoder; and an image encoder that multiplies 8 bits by 8 bits (``images``), which is also faster on a CPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from blip2.checkpoint.settings import read_quantization
from blip2.errors import OptionError, option, setting
from blip2.linear import Table
from blip2.model import Blip2
from blip2.quantized import BITS, GROUP_SIZES, QuantizedLinear

CODES, SCALES = "codes", "scales"
KINDS = {"int8": 8, "int4": 4}
PARTS = ("language", "vision")
OUTPUT = "language.output"  # the logits: 4 bits are too few for them, and it is small


@dataclass(frozen=True)
class Quantization:
    """``bits`` 8 or 4; ``group_size`` inputs share a scale (4 bits); the linear layers of ``parts``.

    ``images``: linear layers of the image encoder, which are then not in ``parts``, have weights and activations of 8
    bits.
    """

    bits: int
    group_size: int = 64
    parts: tuple[str, ...] = ("language",)
    images: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"{option('bits')} is {self.bits}; weights are quantised to 8 or 4 bits")
        if self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise OptionError(f"{option('group_size')} is {self.group_size}; use one of {sizes}")
        if not (self.parts or self.images) or set(self.parts) - set(PARTS):
            raise OptionError(f"parts is {', '.join(self.parts) or 'empty'}; use {' or '.join(PARTS)}")
        assert not (self.images and "vision" in self.parts)

    def as_json(self) -> dict[str, Any]:
        values = asdict(self) | {"parts": list(self.parts)}
        if not self.images:  # so that earlier versions can read the rest
            del values["images"]
        return values

    def bits_of(self, name: str) -> int | None:
        """Bits of a linear layer, by name; None if it is not quantised."""
        part = name.split(".")[0]
        if part == "vision" and self.images:
            return 8
        if part not in self.parts:
            return None
        return 8 if name == OUTPUT else self.bits


def quantization(
    kind: str | None, *, vision: bool = False, group_size: int = 64, images: str | None = None
) -> Quantization | None:
    """From option values: None, "int8" or "int4"; ``vision``: also the image encoder's weights. ``images``: None, or
    "int8" for an image encoder that multiplies in 8 bits."""
    if images not in (None, "int8"):
        raise OptionError(f"{option('vision')} is {images!r}; use int8, or leave it out")
    if images is not None:
        if vision:
            raise OptionError(
                f"{option('quantize_vision')} is set together with {option('vision')}, which also quantises the image "
                "encoder's weights; use one of them"
            )
        rest = quantization(kind, group_size=group_size)
        return Quantization(8, parts=(), images=True) if rest is None else replace(rest, images=True)
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
    """How the weights in a folder are, or will be, quantised; `OptionError` if both differ."""
    found = read_quantization(folder)
    if found is None:
        return asked
    stored = Quantization(found["bits"], found["group_size"], tuple(found["parts"]), found.get("images", False))
    if asked is None:
        return stored
    if asked.images:
        if stored.bits_of("vision") == 4:
            raise OptionError(
                f"{folder}: the image encoder is quantised to 4 bits, and cannot be multiplied in 8 "
                f"({setting('vision', 'int8')}); use it as it is, or the original"
            )
        parts = tuple(part for part in stored.parts if part != "vision")
        stored = replace(stored, parts=parts, images=True)
        if not asked.parts:
            return stored
    if asked != stored:
        raise OptionError(f"{folder} is already quantised to {stored.bits} bits; use it as it is, or the original")
    return stored


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a loaded model is quantised; None if it is not."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if not layers:
        return None
    images = [name for name, layer in layers.items() if layer.activation_bits == 8]
    rest = {name: layer for name, layer in layers.items() if name not in images}
    if not rest:
        return Quantization(8, parts=(), images=True)
    lowest = min(rest.values(), key=lambda layer: layer.bits)
    parts = tuple(part for part in PARTS if any(name.startswith(f"{part}.") for name in rest))
    return Quantization(lowest.bits, lowest.group_size if lowest.bits == 4 else 64, parts, bool(images))


def bits_of_layers(model: nn.Module, quantization: Quantization | None) -> dict[str, int]:
    """The quantised linear layers by name, with their bits; never those of the Q-Former."""
    if quantization is None:
        return {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)]
    if has_table_as_head(model) and OUTPUT not in names:
        names.append(OUTPUT)
    bits = {name: quantization.bits_of(name) for name in names}
    return {name: number for name, number in bits.items() if number is not None}


def put_linears(model: nn.Module, quantization: Quantization | None) -> None:
    """Replace each linear layer that is quantised by an empty `QuantizedLinear`.

    If an output layer is tied to the embeddings, a quantised copy is made beside the embeddings.
    """
    quantized = bits_of_layers(model, quantization)

    def stand_in(name: str, num_inputs: int, num_outputs: int, has_bias: bool) -> QuantizedLinear:
        assert quantization is not None
        bits, group_size = quantized[name], quantization.group_size
        activation_bits = 8 if quantization.images and name.startswith("vision.") else 15
        with torch.device("meta"):
            return QuantizedLinear(
                num_inputs, num_outputs, bits=bits, group_size=group_size, has_bias=has_bias,
                activation_bits=activation_bits,
            )  # fmt: skip

    for name, linear in list(model.named_modules()):
        if name in quantized and isinstance(linear, nn.Linear):
            instead = stand_in(name, linear.in_features, linear.out_features, linear.bias is not None)
            model.set_submodule(name, instead)
    if has_table_as_head(model):
        num_tokens, width = model.language.token_embedding.weight.shape
        model.language.output = stand_in(OUTPUT, width, num_tokens, False) if OUTPUT in quantized else None


def has_table_as_head(model: nn.Module) -> TypeGuard[Blip2]:
    return isinstance(getattr(getattr(model, "language", None), "token_embedding", None), Table)
