"""Frozen parts in files of their own, which several models share by hard links.

Each model is complete for every reader, including `transformers`, and remains so if another is moved or removed. Shared
files are never changed; `save` replaces files instead of writing to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.files import INDEX, TRAINED, weight_files
from blip2.checkpoint.reader import Place, find_tensors
from blip2.errors import CheckpointError, option

FROZEN = {"vision_model.": "vision_model", "language_model.": "language_model"}
POST_NORM = "vision_model.post_layernorm."
"""Belongs to the image encoder by name, but is trained."""
FILE = re.compile(rf"({'|'.join(FROZEN.values())})(-\d{{5}}-of-\d{{5}})?\.safetensors")


def stem_of(name: str) -> str:
    """Stem of the file that contains a weight, by its published name."""
    found = next((stem for begin, stem in FROZEN.items() if name.startswith(begin)), TRAINED)
    return TRAINED if name.startswith(POST_NORM) else found


def frozen_files(folder: Path) -> dict[str, Place]:
    """Weights of frozen parts in files of their own, by published names; empty if there are none."""
    if not (folder / INDEX).exists() or not any(FILE.fullmatch(file) for file in weight_files(folder)):
        return {}
    found = {name: place for name, place in find_tensors(folder).items() if FILE.fullmatch(place.path.name)}
    mixed = {place.path for name, place in found.items() if stem_of(name) == TRAINED}
    return {name: place for name, place in found.items() if place.path not in mixed}


def parts_of(files: Mapping[str, Place], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Place]]:
    """By stem, the parts that are complete in ``files``: all wanted weights with their shapes, and no others."""
    parts = {}
    for stem in FROZEN.values():
        have = {name: place for name, place in files.items() if stem_of(name) == stem}
        shapes = {name: shape for name, shape in wanted.items() if stem_of(name) == stem}
        if have and {name: place.shape for name, place in have.items()} == shapes:
            parts[stem] = have
    return parts


def is_same(place: Place, tensor: Tensor) -> bool:
    """Whether both have the same bits and dtype."""
    return place.dtype == tensor.dtype and torch.equal(place.read(), tensor.cpu())


def models_in(folder: Path) -> list[Path]:
    """A model, or those that `assemble` wrote into a folder. Raises CheckpointError if none has parts to share."""
    found = [each for each in (folder, folder / "generative", folder / "matching") if frozen_files(each)]
    if not found:
        raise CheckpointError(
            f"{folder}: has no model with frozen parts in files of their own; give the folder of a model that blip2 "
            f"assemble wrote, or that was trained from one, or leave {option('link')} out"
        )
    return found
