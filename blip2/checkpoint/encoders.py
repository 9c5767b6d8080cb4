"""Image encoders of other families, read from their published files into a `VisionTransformer`.

Differences that are only arithmetic are resolved here: layer scales are folded into the weights before them, missing
biases become zero, registers join the class token, and positions are interpolated to the image size.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from blip2.checkpoint.bounds import AGAIN, BOUNDS, LARGEST_IMAGE, check_value
from blip2.checkpoint.convolutions import LiteEncoder, lite_file, open_lite
from blip2.checkpoint.families import BLIP2, FAMILIES, Family
from blip2.checkpoint.keys import published_names
from blip2.checkpoint.preprocessor import ImageSettings, image_settings
from blip2.checkpoint.reader import Place, find_tensors
from blip2.checkpoint.settings import parse_vision, read_json
from blip2.checkpoint.vision_fields import CONVOLUTIONAL, parse_convolutional
from blip2.config import VisionConfig
from blip2.errors import CheckpointError, OptionError, option
from blip2.model import Vision, build_image_encoder
from blip2.vision import VisionTransformer, positions_of

Layer = Literal["second-last", "last"]
SAME_ACTIVATION = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}


@dataclass(frozen=True)
class Encoder:
    """An image encoder in its files. ``config``: as in a BLIP-2. ``settings``: the image preprocessing."""

    folder: Path
    config: VisionConfig
    settings: ImageSettings
    family: Family
    trained: VisionConfig
    """The configuration in the files, which may have another image size."""
    published: Mapping[str, Any]
    """The encoder's section of config.json."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the `VisionTransformer` by its name there, one at a time, in the dtype of the file.

        Raises `CheckpointError` for missing or unexpected weights, and for other shapes than in config.json.
        """
        weights = _Weights.of(self.folder, self.family)
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in VisionTransformer(self.trained).named_parameters()}
        for name, shape in wanted.items():
            if name == "class_embedding":
                yield name, self._prefix(weights)
            elif name == "position_embedding":
                yield name, self._positions(weights)
            else:
                yield name, self._weight(weights, name, shape)
        num_layers = self.trained.num_layers
        last = self.published["num_hidden_layers"]
        left_out = [f"{self.family.layer.format(num)}." for num in range(num_layers, last)]
        if absent := [start for start in left_out if not any(name.startswith(start) for name in weights.left)]:
            raise CheckpointError(
                f"{self.folder}: {absent[0]} is missing; the weights and config.json do not match"
            )
        if self.family is not BLIP2:
            left_out.append(self.family.outside["final_norm.*"].removesuffix("*"))
        if rest := [name for name in weights.left if not name.startswith(tuple(left_out))]:
            raise CheckpointError(
                f"{self.folder}: {rest[0]} is unexpected; the weights and config.json do not match"
            )

    def _prefix(self, weights: _Weights) -> Tensor:
        """``float[1, T, D]``: the class token, followed by the registers."""
        number, width, names = self.trained.num_prefix_tokens, self.trained.hidden_size, self.family.outside
        if number == 0:
            return torch.empty(1, 0, width, dtype=weights.dtype)
        if "registers" not in names or number == 1:
            return weights.read(names["class_embedding"], (1, number, width))
        parts = (("class_embedding", 1), ("registers", number - 1))
        return torch.cat([weights.read(names[name], (1, length, width)) for name, length in parts], dim=1)

    def _positions(self, weights: _Weights) -> Tensor:
        """``float[1, T + P, D]`` for the requested image size; registers have no position and come last."""
        number, width = self.trained.num_prefix_tokens, self.trained.hidden_size
        side = self.config.image_size // self.config.patch_size
        if "position_embedding" not in self.family.outside:  # rotary positions instead
            return torch.zeros(1, number + side * side, width, dtype=weights.dtype)
        num_registers = number - 1 if "registers" in self.family.outside else 0
        num_placed = number - num_registers
        shape = (1, num_placed + self.trained.num_patches, width)
        placed_1PD = weights.read(self.family.outside["position_embedding"], shape)
        first_1TD, grid_1PD = placed_1PD.split([num_placed, self.trained.num_patches], dim=1)
        nowhere_1RD = torch.zeros(1, num_registers, width, dtype=weights.dtype)
        return positions_of(self.trained, torch.cat([first_1TD, nowhere_1RD, grid_1PD], dim=1), side, side)

    def _weight(self, weights: _Weights, name: str, shape: tuple[int, ...]) -> Tensor:
        """A weight that is one tensor in the files, or several concatenated ones."""
        layer = re.match(r"blocks\.(\d+)\.", name)
        stem, _, last = name.rpartition(".")
        if layer is None:
            table, begin, kind = self.family.outside, "", stem
        else:
            gate = self.family.gate
            table = self.family.inside | (gate[1] if gate and self.trained.has_gate else {})
            begin, kind = f"{self.family.layer.format(layer[1])}.", stem.rpartition(".")[2]
        if f"{kind}.*" not in table:  # the norm that BLIP-2 trains
            assert kind == "post_norm", name
            return (torch.ones if last == "weight" else torch.zeros)(shape, dtype=weights.dtype)
        theirs = published_names(begin + table[f"{kind}.*"].replace(".*", f".{last}"))
        each = (shape[0] // len(theirs), *shape[1:])
        tensor = torch.cat([self._or_zeros(weights, part, each) for part in theirs])
        if layer is not None and kind in self.family.scales:
            scale_D = weights.read(begin + self.family.scales[kind], shape[:1]).float()
            tensor = (tensor.float() * scale_D.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)
        return tensor

    def _or_zeros(self, weights: _Weights, name: str, shape: tuple[int, ...]) -> Tensor:
        says = next((says for ending, says in self.family.biases.items() if name.endswith(ending)), None)
        if says is not None and not self.published[says]:
            return torch.zeros(shape, dtype=weights.dtype)
        return weights.read(name, shape)


class _Weights:
    """The tensors of an encoder by their names in the tables; ``left``: those that were not read."""

    def __init__(self, folder: Path, places: dict[str, Place], ignored: str) -> None:
        self._folder, self._places = folder, places
        # Some files store the absence of registers as an empty tensor.
        self.left = dict.fromkeys(name for name in sorted(places) if places[name].num_bytes)
        self.left = {name: None for name in self.left if not re.search(ignored, name)}
        self.dtype = next(place.dtype for place in places.values() if place.dtype.is_floating_point)

    @classmethod
    def of(cls, folder: Path, family: Family) -> _Weights:
        """The prefix of all names follows from the patch embedding; other models may be in the same file."""
        places = find_tensors(folder)
        patch = family.outside["patch_embedding.*"].replace("*", "weight")
        begin = next((each for each in family.begins if each + patch in places), None)
        if begin is None:
            raise CheckpointError(
                f"{folder}: {family.begins[0]}{patch} is missing; these are the weights of another model"
            )
        inside = {name.removeprefix(begin): place for name, place in places.items() if name.startswith(begin)}
        return cls(folder, inside, family.ignored)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor; it may lack leading dimensions of 1."""
        if (place := self._places.get(name)) is None:
            raise CheckpointError(
                f"{self._folder}: {name} is missing; the weights and config.json do not match"
            )
        if place.shape not in [shape[start:] for start in range(3) if math.prod(shape[:start]) == 1]:
            raise CheckpointError(
                f"{self._folder}: {name} has shape {list(place.shape)}, but config.json requires {list(shape)}; the "
                "weights belong to another configuration"
            )
        self.left.pop(name, None)
        return place.read().view(shape)


def open_encoder(
    folder: Path,
    *,
    layer: Layer = "second-last",
    class_token: bool = True,
    image_size: int | None = None,
    whole_picture: bool = False,
) -> Encoder | LiteEncoder:
    """The published encoder in a folder (config.json, preprocessor_config.json, model.safetensors), or in the file of
    an EfficientNet-Lite.

    ``layer``: the layer whose output the Q-Former reads: the second-last, as in the paper, or the last, with the
    family's final norm. ``class_token``: whether the Q-Former reads it, if there is one. ``image_size``: side of the
    images in pixels, instead of that in preprocessor_config.json. ``whole_picture``: resize the whole image to the
    square, even if the encoder was trained with centre crops.

    Raises `CheckpointError` for unknown families and unsupported features, OptionError for an invalid layer or size.
    """
    encoder = _open(folder, layer, class_token, image_size)
    return replace(encoder, settings=replace(encoder.settings, shortest_edge=None)) if whole_picture else encoder


def _open(folder: Path, layer: Layer, class_token: bool, image_size: int | None) -> Encoder | LiteEncoder:
    if (file := lite_file(folder)) is not None:
        _check_layer(layer)
        return _lite_with(open_lite(file, has_head=layer == "last"), class_token, image_size)
    path = folder / "config.json"
    content = read_json(path)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = "; SigLIP 2 only without NaFlex" if str(kind).startswith("siglip2") else ""
        raise CheckpointError(
            f"{path}: model_type is {reprlib.repr(kind)}, which is not a supported image encoder{hint}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    section = content.get("vision_config", content)
    try:
        if not isinstance(section, dict):
            raise ValueError(f"vision_config is not a JSON object; {AGAIN}")
        if section.get("model_type") == CONVOLUTIONAL:
            lite = LiteEncoder(folder, parse_convolutional(section), image_settings(folder))
            return _lite_with(lite, class_token, image_size)
        published = family.defaults | {key: value for key, value in section.items() if value is not None}
        trained = parse_vision(published) if family is BLIP2 else _config(family, published)
        published.setdefault("num_hidden_layers", trained.num_layers)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    trained = _cut(trained, family, layer, path)
    settings = image_settings(folder)
    if image_size is not None:
        settings = _of_size(settings, image_size)
    if settings.size < trained.patch_size:
        raise CheckpointError(
            f"{folder}: images have {settings.size} pixels, but a patch has {trained.patch_size}; use larger images"
        )
    trained = replace(trained, keeps_class_token=class_token and trained.keeps_class_token)
    return Encoder(folder, replace(trained, image_size=settings.size), settings, family, trained, published)


def load_encoder(folder: Path, **options: Any) -> tuple[Vision, ImageSettings]:
    """As `open_encoder`: the encoder with its weights, and its image settings."""
    encoder = open_encoder(folder, **options)
    with torch.device("meta"):
        vision = build_image_encoder(encoder.config)
    for name, tensor in encoder.tensors():
        module_name, _, last = name.rpartition(".")
        setattr(vision.get_submodule(module_name), last, nn.Parameter(tensor))
    return vision.eval(), encoder.settings


def _config(family: Family, published: dict[str, Any]) -> VisionConfig:
    """With all layers, before any is removed. Raises ValueError for unsupported features."""
    if published.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels is {reprlib.repr(published['num_channels'])}; images have 3 channels here")
    has_gate = family.gate is not None and bool(published.get(family.gate[0], False))
    activation = published["hidden_act"]
    if "mlp_ratio" in family.defaults:  # DINOv2
        width = check_value("hidden_size", published["hidden_size"], 768, bounds=BOUNDS["hidden_size"])
        intermediate_size = int(width * check_value("mlp_ratio", published["mlp_ratio"], 4.0, bounds=(0.1, 64)))
        if has_gate:
            intermediate_size, activation = (int(intermediate_size * 2 / 3) + 7) // 8 * 8, "silu"
    else:
        intermediate_size = published["intermediate_size"]
    num_registers = published["num_register_tokens"] if "num_register_tokens" in family.defaults else 0
    check_value("num_register_tokens", num_registers, 0, bounds=(0, 1000))
    fields = {
        name: published[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    } | {
        "intermediate_size": intermediate_size,
        "image_size": _side(published["image_size"]),
        "patch_size": _side(published["patch_size"]),
        "hidden_act": SAME_ACTIVATION.get(activation, activation) if isinstance(activation, str) else activation,
        "gated_mlp": has_gate,
        "num_prefix_tokens": 1 + num_registers,
        "rope_theta": published["rope_theta"] if "rope_theta" in family.defaults else 0.0,
    }
    return replace(parse_vision(fields), **family.always)


def _side(size: Any) -> Any:
    """224, or [224, 224]."""
    return size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size


def _cut(config: VisionConfig, family: Family, layer: str, path: Path) -> VisionConfig:
    """The encoder up to the layer whose output is used."""
    _check_layer(layer)
    if family is BLIP2:
        if layer == "last":
            raise OptionError(f"{path}: a BLIP-2 does not contain the last layer of its image encoder; use the "
                "second-last")
        return config
    if layer == "last":
        return replace(config, has_final_norm=family.is_norm_of_patches)
    if config.num_layers == 1:
        raise CheckpointError(f"{path}: num_hidden_layers is 1, so there is no second-last layer; use the last")
    return replace(config, num_layers=config.num_layers - 1)


def _check_layer(layer: str) -> None:
    if layer not in get_args(Layer):
        raise OptionError(f"{option('layer')} is {layer!r}; use {' or '.join(get_args(Layer))}")


def _lite_with(encoder: LiteEncoder, class_token: bool, image_size: int | None) -> LiteEncoder:
    """Convolutions have no position embeddings, so any size works."""
    settings = encoder.settings if image_size is None else _of_size(encoder.settings, image_size)
    keeps_class_token = class_token and encoder.config.keeps_class_token
    config = replace(encoder.config, image_size=settings.size, keeps_class_token=keeps_class_token)
    return replace(encoder, settings=settings, config=config)


def _of_size(settings: ImageSettings, size: int) -> ImageSettings:
    """Images of another size, with the same share in the crop."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_IMAGE:
        raise OptionError(f"{option('image_size')} is {size!r}; it may be 1 to {LARGEST_IMAGE} pixels")
    edge = settings.shortest_edge
    return replace(settings, size=size, shortest_edge=edge and max(size, round(edge * size / settings.size)))
