"""Placement of a model's parts: all on the GPU if they fit; what does not fit stays on the CPU.

A layer on the CPU is computed there. The alternative, copying weights to the GPU for each call, would read all of
them over the bus for every new token, which is slower than the CPU's own memory for the few rows of an answer. Here
only one vector for each row is copied into a layer and out of it.

The GPU gets the parts that profit most, in this order:

1. the Q-Former with its projection or heads, and the image encoder: much arithmetic, the same for every image;
2. the language model's tables, norms and head: used for each token, and the sampler runs there;
3. as many of its layers as fit, from the first, a decoder's before an encoder's: a decoder's weights are read for each
   token, an encoder's once for an answer.

`accelerate` moves the activations; only a divided model needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2 import checkpoint
from blip2.checkpoint.load import count_parameters, empty_model
from blip2.checkpoint.precision import Precision, choose_precision
from blip2.checkpoint.quantize import Quantization, quantization_in
from blip2.checkpoint.settings import read_config
from blip2.config import Blip2Config, MatcherConfig
from blip2.errors import OptionError, setting
from blip2.installed import install_line
from blip2.model import Blip2, Blip2Matcher
from blip2.quantized import QuantizedLinear

Model = Blip2 | Blip2Matcher
Config = Blip2Config | MatcherConfig

CPU = "cpu"
REST, VISION, LANGUAGE = "", "vision", "language"
LAYERS = ("language.blocks", "language.decoder", "language.encoder")
ORDER = (REST, VISION, LANGUAGE, *LAYERS)

RESERVED_BYTES, RESERVED_SHARE = 1_000_000_000, 0.1
"""GPU memory that is left free for libraries, activations and the key-value cache: on 8 GB about 1.8 GB, where the
cache of 8 images with 5 beams takes about 1.4 GB in an OPT-2.7b. Calculated, not measured."""


@dataclass(frozen=True)
class Piece:
    """Weights that are placed together. ``name``: the prefix of their names, except for other pieces; "" is the rest,
    the Q-Former and what follows it."""

    name: str
    num_bytes: int
    device: str

    @property
    def layers(self) -> str:
        """For a layer of the language model, the list that contains it; else ""."""
        stem = self.name.rpartition(".")[0]
        return stem if stem in LAYERS else ""


@dataclass(frozen=True)
class Plan:
    """The device of each piece, in the order of priority for the GPU. ``dtype``: for loading; ``reason``: explanation
    as text."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype | None
    reason: str

    @property
    def devices(self) -> dict[str, str]:
        """The device of each piece, for `checkpoint.load`."""
        return {piece.name: piece.device for piece in self.pieces}

    @property
    def device(self) -> str:
        """The device that decides the dtype: the GPU, if any piece is there."""
        return next((piece.device for piece in self.pieces if piece.device != CPU), CPU)

    @property
    def is_split(self) -> bool:
        return len(set(self.devices.values())) > 1

    def num_bytes(self, device: str) -> int:
        """Bytes of weights on a device."""
        return sum(piece.num_bytes for piece in self.pieces if piece.device == device)

    def lines(self) -> list[str]:
        """The plan as text: a line for each device with its bytes and pieces, and the reason."""
        devices = dict.fromkeys(piece.device for piece in self.pieces)
        rows = [f"{device}: {_size(self.num_bytes(device))}, {self._pieces_on(device)}" for device in devices]
        return [*rows, self.reason]

    def _pieces_on(self, device: str) -> str:
        if not self.is_split:
            return "everything"
        words = {REST: "Q-Former and projection", VISION: "image encoder", LANGUAGE: "language model without layers"}
        found = []
        for layers, run in groupby((piece for piece in self.pieces if piece.device == device), lambda it: it.layers):
            if not layers:
                found += [words[piece.name] for piece in run]
                continue
            first, *others = (piece.name.rpartition(".")[2] for piece in run)
            found.append(f"{layers} {first}{f' to {others[-1]}' if others else ''}")
        return ", ".join(found)


def plan(
    config: Config,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    free_bytes: int | None = None,
    gpu: str = "cuda:0",
) -> Plan:
    """Plan the placement of a model. Nothing is loaded, and no GPU is needed.

    ``device``: a device for the whole model, or "auto": as much as fits onto ``gpu``, which has ``free_bytes`` free
    (None: there is no GPU). ``dtype`` and ``quantize`` as for `checkpoint.load`. A divided model uses a dtype that both
    devices support: bfloat16 instead of float16. Raises OptionError for an unsupported dtype.
    """
    model = empty_model(config, quantize)
    num_parameters = count_parameters(model)

    def sizes(device: str, dtype: torch.dtype | None) -> dict[str, int]:
        precision = choose_precision(
            config, torch.device(device), dtype, num_parameters=num_parameters, quantization=quantize
        )
        return _sizes(model, precision)

    def whole(device: str, reason: str) -> Plan:
        return _plan(sizes(device, dtype), {}, device, dtype, reason)

    if device != "auto":
        return whole(device, f"{device}, as requested")
    if free_bytes is None:
        return whole(CPU, "there is no GPU")
    num_free_bytes = int(free_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES
    is_free = f"{gpu} has {_size(free_bytes)} free, {_size(max(num_free_bytes, 0))} of them for weights"
    if sum(sizes(gpu, dtype).values()) <= num_free_bytes:
        return whole(gpu, f"{is_free}: everything fits")
    common = torch.float32 if dtype == torch.float32 else torch.bfloat16
    wanted = sizes(gpu, common)
    on_gpu = _as_many_as_fit(wanted, num_free_bytes)
    if not on_gpu:
        return whole(CPU, f"{is_free}: no part of the model fits")
    reason = f"{is_free}: the rest stays on the CPU, which computes it"
    if common != dtype:
        reason += ", all in bfloat16, since a CPU does not support float16"
    if quantize is None and isinstance(config, Blip2Config):
        reason += "; quantised (int8, int4) the model is smaller"
    return _plan(wanted, dict.fromkeys(on_gpu, gpu), CPU, common, reason)


def plan_for(
    folder: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    free_bytes: int | None = None,
) -> Plan:
    """Plan the placement of a checkpoint on this machine, or with ``free_bytes`` for a GPU with this much free memory.

    Raises CheckpointError and OptionError as `checkpoint.load`, except for errors in the weights.
    """
    quantize = quantization_in(folder, quantize)
    gpu = "cuda:0"
    if device == "auto" and free_bytes is None and torch.cuda.is_available():
        gpu = f"cuda:{torch.cuda.current_device()}"
        # Memory that torch has reserved but does not use is free for this model.
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free_bytes = torch.cuda.mem_get_info()[0] + held
    return plan(read_config(folder), device=device, dtype=dtype, quantize=quantize, free_bytes=free_bytes, gpu=gpu)


def load(folder: Path, plan: Plan, **options: Any) -> Model:
    """Load the model in a folder, with each piece on its planned device; ``options`` as for `checkpoint.load`.

    Raises OptionError, before anything is read, if the model is divided and `accelerate` is not installed.
    """
    if plan.is_split:
        _hooks()
    model = checkpoint.load(folder, device=plan.device, devices=plan.devices, dtype=plan.dtype, **options)
    return place(model, plan)


def place(model: Model, plan: Plan) -> Model:
    """Make a model whose weights are on their planned devices move its inputs there; not needed for a single device."""
    if not plan.is_split:
        return model
    hooks = _hooks()

    def fetch(module: nn.Module, device: str, *, brings_back: bool = False) -> None:
        hook = hooks.AlignDevicesHook(execution_device=torch.device(device), io_same_device=brings_back)
        hooks.add_hook_to_module(module, hook)

    devices = plan.devices
    fetch(model.vision, devices[VISION])
    fetch(model.qformer, devices[REST])
    for piece in plan.pieces:
        if piece.layers and piece.device != devices[LANGUAGE]:
            layer = model.get_submodule(piece.name)
            fetch(layer, piece.device, brings_back=True)
            if piece.layers == "language.decoder":  # called separately, for its cached keys and values
                fetch(layer.get_submodule("cross_attention.key_value"), piece.device)
    return model


def _hooks() -> Any:
    try:
        from accelerate import hooks
    except ImportError:
        raise OptionError(
            "this model does not fit onto the GPU as a whole, and accelerate, which divides it, is not installed; "
            f"{install_line('split')}, or {setting('device', 'cpu')}"
        ) from None
    return hooks


def _sizes(model: nn.Module, precision: Precision) -> dict[str, int]:
    """Bytes of each piece's weights, in the order of priority."""
    found: dict[str, int] = {}
    for module_name, module in model.named_modules():
        tensors: Iterable[tuple[str, torch.Tensor]] = chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        )
        for last, tensor in tensors:
            name = f"{module_name}.{last}".lstrip(".")
            dtype = tensor.dtype if isinstance(module, QuantizedLinear) else precision.of(name)
            piece = _piece_of(name)
            found[piece] = found.get(piece, 0) + tensor.numel() * dtype.itemsize
    return dict(sorted(found.items(), key=lambda item: _priority(item[0])))


def _piece_of(name: str) -> str:
    """language.decoder.3.feed_forward.down.weight -> language.decoder.3; projection.bias -> the rest."""
    words = name.split(".")
    if ".".join(words[:2]) in LAYERS:
        return ".".join(words[:3])
    return words[0] if words[0] in (VISION, LANGUAGE) else REST


def _priority(piece: str) -> tuple[int, int]:
    stem, _, number = piece.rpartition(".")
    return (ORDER.index(stem), int(number)) if stem else (ORDER.index(piece), 0)


def _as_many_as_fit(sizes: dict[str, int], num_free_bytes: int) -> list[str]:
    """The pieces for the GPU: each one that still fits, by priority; layers only if the rest of the language model
    fits."""
    chosen: list[str] = []
    for name, num_bytes in sizes.items():
        if num_bytes <= num_free_bytes and not (name.startswith(LAYERS) and LANGUAGE not in chosen):
            chosen.append(name)
            num_free_bytes -= num_bytes
    return chosen


def _plan(sizes: dict[str, int], devices: dict[str, str], default: str, dtype: torch.dtype | None, reason: str) -> Plan:
    pieces = tuple(Piece(name, num_bytes, devices.get(name, default)) for name, num_bytes in sizes.items())
    return Plan(pieces, dtype, reason)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
