"""Where each piece of a model goes: all of it onto the GPU where it fits, else what does not fit stays on the CPU.

A layer on the CPU computes there, with its weights where they are. The other way, weights lent to the GPU for each
call, reads all of them over the bus for every new token: that is slower than the CPU's own memory, for the few rows
of an answer. What travels here is one vector a row into a layer and out of it.

So the GPU takes what it is worth most to, in this order:

1. the Q-Former with its projection or heads, and the image encoder: much arithmetic, the same for every picture;
2. the language model's tables, norms and head: used for each token, and where its tokens are chosen;
3. its layers from the first, as many as fit, a decoder's before an encoder's: a decoder's weights are read again for
   each token, an encoder's once for an answer.

`accelerate` moves the activations; only a model that is divided needs it.
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
"""Of the GPU's free memory, what the weights leave to libraries, activations, and keys and values: on 8 GB about
1.8 GB, where those of 8 pictures with 5 beams take some 1.4 GB in an OPT-2.7b. Reckoned, not measured."""


@dataclass(frozen=True)
class Piece:
    """What stays together. ``name``: how the names of its weights begin, those of other pieces aside; "" is the rest,
    the Q-Former and what follows it."""

    name: str
    num_bytes: int
    device: str

    @property
    def layers(self) -> str:
        """For a layer of the language model, the list that it is in; else ""."""
        stem = self.name.rpartition(".")[0]
        return stem if stem in LAYERS else ""


@dataclass(frozen=True)
class Plan:
    """Where each piece goes, the worthiest of the GPU first. ``dtype``: what to load in; ``reason``: why, in words."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype | None
    reason: str

    @property
    def devices(self) -> dict[str, str]:
        """The device of each piece, as `checkpoint.load` takes them."""
        return {piece.name: piece.device for piece in self.pieces}

    @property
    def device(self) -> str:
        """The one that the precision has to suit: the GPU, if anything is there."""
        return next((piece.device for piece in self.pieces if piece.device != CPU), CPU)

    @property
    def is_split(self) -> bool:
        return len(set(self.devices.values())) > 1

    def num_bytes(self, device: str) -> int:
        """Of weights on a device."""
        return sum(piece.num_bytes for piece in self.pieces if piece.device == device)

    def lines(self) -> list[str]:
        """For people: a line for each device with its bytes and its pieces, and the reason."""
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
    """Where a model of this configuration goes; nothing is loaded, and no GPU need be there.

    ``device``: all of it to that one, or "auto": to ``gpu``, of whose memory ``free_bytes`` are free (None: there is
    no GPU), as far as it fits. ``dtype`` and ``quantize`` as for `checkpoint.load`. A model that is divided computes
    in a precision that both sides have: bfloat16 in place of float16. Raises OptionError for a dtype that cannot be.
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
        return whole(device, f"{device}, as asked for")
    if free_bytes is None:
        return whole(CPU, "there is no GPU")
    room = int(free_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES
    is_free = f"{gpu} has {_size(free_bytes)} free, {_size(max(room, 0))} of them for weights"
    if sum(sizes(gpu, dtype).values()) <= room:
        return whole(gpu, f"{is_free}: everything fits")
    common = torch.float32 if dtype == torch.float32 else torch.bfloat16
    wanted = sizes(gpu, common)
    on_gpu = _as_many_as_fit(wanted, room)
    if not on_gpu:
        return whole(CPU, f"{is_free}: no part of the model fits")
    reason = f"{is_free}: the rest stays on the CPU and computes there"
    if common != dtype:
        reason += ", all in bfloat16, since a CPU does not compute in float16"
    if quantize is None and isinstance(config, Blip2Config):
        reason += "; quantised (int8, int4) it is smaller"
    return _plan(wanted, dict.fromkeys(on_gpu, gpu), CPU, common, reason)


def plan_for(
    folder: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    free_bytes: int | None = None,
) -> Plan:
    """The plan for a checkpoint on this machine, or, with ``free_bytes``, for a GPU that has so many free.

    Raises CheckpointError and OptionError as `checkpoint.load`, but for the weights.
    """
    quantize = quantization_in(folder, quantize)
    gpu = "cuda:0"
    if device == "auto" and free_bytes is None and torch.cuda.is_available():
        gpu = f"cuda:{torch.cuda.current_device()}"
        # What torch holds and does not use is free for us, too.
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free_bytes = torch.cuda.mem_get_info()[0] + held
    return plan(read_config(folder), device=device, dtype=dtype, quantize=quantize, free_bytes=free_bytes, gpu=gpu)


def load(folder: Path, plan: Plan, **options: Any) -> Model:
    """The model in a folder, each piece where the plan has it; ``options`` as for `checkpoint.load`.

    Raises OptionError, before anything is read, if the model is to be divided and `accelerate` is not installed.
    """
    if plan.is_split:
        _hooks()
    model = checkpoint.load(folder, device=plan.device, devices=plan.devices, dtype=plan.dtype, **options)
    return place(model, plan)


def place(model: Model, plan: Plan) -> Model:
    """Let a model whose weights are where the plan has them fetch its inputs to them; one device needs nothing."""
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
            if piece.layers == "language.decoder":  # called beside the layer, for keys and values that it keeps
                fetch(layer.get_submodule("cross_attention.key_value"), piece.device)
    return model


def _hooks() -> Any:
    try:
        from accelerate import hooks
    except ImportError:
        raise OptionError(
            "this model does not fit onto the GPU whole, and accelerate, which would divide it, is not installed; "
            f"{install_line('split')}, or {setting('device', 'cpu')}"
        ) from None
    return hooks


def _sizes(model: nn.Module, precision: Precision) -> dict[str, int]:
    """The bytes of each piece's weights, in the order of worth."""
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
    return dict(sorted(found.items(), key=lambda item: _worth(item[0])))


def _piece_of(name: str) -> str:
    """language.decoder.3.feed_forward.down.weight -> language.decoder.3; projection.bias -> the rest."""
    words = name.split(".")
    if ".".join(words[:2]) in LAYERS:
        return ".".join(words[:3])
    return words[0] if words[0] in (VISION, LANGUAGE) else REST


def _worth(piece: str) -> tuple[int, int]:
    stem, _, number = piece.rpartition(".")
    return (ORDER.index(stem), int(number)) if stem else (ORDER.index(piece), 0)


def _as_many_as_fit(sizes: dict[str, int], room: int) -> list[str]:
    """The pieces for the GPU: each that still fits, in order of worth, and no layer without its language model."""
    chosen: list[str] = []
    for name, num_bytes in sizes.items():
        if num_bytes <= room and not (name.startswith(LAYERS) and LANGUAGE not in chosen):
            chosen.append(name)
            room -= num_bytes
    return chosen


def _plan(sizes: dict[str, int], devices: dict[str, str], default: str, dtype: torch.dtype | None, reason: str) -> Plan:
    pieces = tuple(Piece(name, num_bytes, devices.get(name, default)) for name, num_bytes in sizes.items())
    return Plan(pieces, dtype, reason)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
