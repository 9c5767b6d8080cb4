"""What a model is and needs, from its configuration alone: no weight is read or allocated."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from blip2.checkpoint.load import count_parameters, empty_model
from blip2.checkpoint.names import resolve
from blip2.checkpoint.precision import Precision, choose_precision
from blip2.checkpoint.quantize import OUTPUT, Quantization, bits_of_layers, put_linears
from blip2.checkpoint.reader import find_tensors
from blip2.config import Blip2Config, ConvolutionalConfig, LanguageConfig, MatcherConfig, T5Config, VisionConfig
from blip2.linear import Table, is_worth_packing
from blip2.published import PUBLISHED
from blip2.quantized import QuantizedLinear

Config = Blip2Config | MatcherConfig
Value = TypeVar("Value", bound=Hashable)

WHOLE_PARTS = ("vision", "language")  # the rest is the Q-Former with its projection or heads


@dataclass(frozen=True)
class Part:
    """One of ``vision``, ``qformer``, ``language``; ``architecture``: a one-line summary."""

    name: str
    architecture: str
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Description:
    """A model as `api.load` would build it. ``num_bytes``: of its weights in memory, nothing else."""

    parts: tuple[Part, ...]
    precision: Precision
    quantization: Quantization | None
    quantized: dict[str, int]
    """The quantised layers, each with its bits."""
    kept: dict[str, torch.dtype]
    """The other layers and embeddings, each with its dtype."""

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def describe(
    config: Config,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (devices are values)
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
) -> Description:
    """Describe the model of a configuration on a device; raises `OptionError` for an unsupported dtype."""
    model = empty_model(config)
    precision = choose_precision(
        config, device, dtype, num_parameters=count_parameters(model), quantization=quantization
    )
    parts = _architectures(config)
    num_parameters, num_bytes = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        num_parameters[part_of(name)] += parameter.numel()

    put_linears(model, quantization)
    quantized = bits_of_layers(model, quantization)
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            num_bytes[part_of(name)] += _quantized_bytes(module)
            continue
        for last, weight in module.named_parameters(recurse=False):
            full = f"{name}.{last}" if name else last
            dtype = precision.of(full)
            # In bf16 on a CPU an OPT's table is stored twice: as embeddings and as output layer.
            is_twice = isinstance(module, Table) and dtype == torch.bfloat16 and device.type == "cpu"
            is_twice = is_twice and OUTPUT not in quantized and is_worth_packing(dtype, weight.numel())
            num_bytes[part_of(full)] += (1 + is_twice) * weight.numel() * dtype.itemsize
            kept[re.sub(r"\.(weight|bias)$", "", full)] = dtype
    return Description(
        parts=tuple(Part(name, line, num_parameters[name], num_bytes[name]) for name, line in parts.items()),
        precision=precision,
        quantization=quantization,
        quantized=quantized,
        kept=kept,
    )


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to, by our name."""
    first = name.split(".")[0]
    return first if first in WHOLE_PARTS else "qformer"


def by_pattern(layers: Mapping[str, Value]) -> list[tuple[str, int, Value]]:
    """Groups layers that differ only in their number: pattern, count, and common value."""
    counts: dict[tuple[str, Value], int] = {}
    for name, value in layers.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern, value] = counts.get((pattern, value), 0) + 1
    return [(pattern, count, value) for (pattern, value), count in counts.items()]


def size_of(model: nn.Module) -> int:
    """Bytes of a model's weights: 2 for each, except for quantised ones."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    quantized = {id(parameter) for layer in layers for parameter in layer.parameters()}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in quantized)
    return 2 * plain + sum(map(_quantized_bytes, layers))


def _quantized_bytes(module: QuantizedLinear) -> int:
    bias = 0 if module.bias is None else module.bias.numel() * torch.float32.itemsize
    return module.codes.nbytes + module.scales.nbytes + bias


def _architectures(config: Config) -> dict[str, str]:
    """A one-line summary of each part."""
    vision, qformer = config.vision, config.qformer
    lines = {
        "vision": vision_line(vision),
        "qformer": f"{qformer.num_layers} layers of width {qformer.hidden_size}, {qformer.num_heads} heads; "
            f"{qformer.num_query_tokens} queries",
    }
    if isinstance(config, MatcherConfig):
        lines["qformer"] += f"; reads text, compares in {config.projection_size} dimensions"
        return lines
    lines["qformer"] += "; reads the prompt" if config.reads_prompt else ""
    return lines | {"language": language_line(config.language)}


def vision_line(vision: VisionConfig | ConvolutionalConfig) -> str:
    if isinstance(vision, ConvolutionalConfig):
        blocks = f"EfficientNet-Lite, {vision.num_layers} blocks up to width {vision.hidden_size}"
    else:
        blocks = f"{vision.num_layers} blocks of width {vision.hidden_size}, {vision.num_heads} heads"
    return f"{blocks}; {vision.image_size} pixels, {vision.num_patches} patches"


def language_line(config: LanguageConfig) -> str:
    more = f" + {config.num_decoder_layers}" if isinstance(config, T5Config) else ""
    blocks = f"{config.kind}, {config.num_layers}{more}"
    return f"{blocks} blocks of width {config.hidden_size}, {config.num_heads} heads; {config.vocab_size} tokens"


@dataclass(frozen=True)
class Stored:
    """The weights in a folder as stored; ``dtypes``: all that occur, the one with the most bytes first.
    ``num_shared_bytes``: of files shared with other folders (hard links)."""

    num_bytes: int
    num_shared_bytes: int
    num_files: int
    dtypes: tuple[torch.dtype, ...]


def stored(folder: Path) -> Stored:
    """From the headers of the files. Raises `CheckpointError` for missing, incomplete or damaged files."""
    places = find_tensors(folder).values()
    sizes: dict[torch.dtype, int] = {}
    for place in places:
        sizes[place.dtype] = sizes.get(place.dtype, 0) + place.num_bytes
    files = {place.path for place in places}
    dtypes = tuple(sorted(sizes, key=lambda dtype: -sizes[dtype]))
    stats = [path.stat() for path in files]
    num_shared_bytes = sum(stat.st_size for stat in stats if stat.st_nlink > 1)
    return Stored(sum(stat.st_size for stat in stats), num_shared_bytes, len(files), dtypes)


def find(name: str | None, revision: str | None = None) -> Path | None:
    """The folder of a model without downloading; None for a published one that is not (completely) in the cache."""
    if name not in PUBLISHED or Path(name).is_dir():
        return resolve(name, revision=revision, local_files_only=True)
    from blip2.checkpoint import hub  # slow to import

    return hub.whole(name, revision) or (None if revision else hub.another(name))


def cache_folder() -> Path:
    """The folder of downloads."""
    from huggingface_hub import constants  # slow to import

    return Path(constants.HF_HUB_CACHE)
