"""Tiny models of each kind, their weights by name, and LAVIS files of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2 import checkpoint
from blip2.checkpoint.lavis import convert_to_lavis
from blip2.config import VisionConfig
from blip2.model import Blip2, Blip2Matcher
from tests import tiny

CLIP = VisionConfig(16, 2, 2, 32, 32, 16, 1e-5, "quick_gelu", has_patch_bias=False, has_pre_norm=True)
KINDS = ["opt", "t5", "opt, CLIP", "stage 1", "stage 1, CLIP", "t5, instructed", "llama, instructed"]


def save_model(kind: str, folder: Path) -> Path:
    """A model in which every weight is random, but for the bias of EVA-CLIP's keys, which is zero."""
    torch.manual_seed(3)
    family, _, other = kind.partition(", ")
    is_clip = other == "CLIP"
    model: Blip2 | Blip2Matcher
    if family == "stage 1":
        config = checkpoint.read_config(tiny.save_matching(folder.with_name("plain")))
        model = Blip2Matcher(replace(config, vision=CLIP) if is_clip else config)
        tokenizer = tiny.matching_tokenizer()
    elif other == "instructed":
        model, tokenizer = tiny.instructed(family), tiny.tokenizer_of(family)
    else:
        config = tiny.generative(family).config
        model = Blip2(replace(config, vision=CLIP) if is_clip else config)
        tokenizer = tiny.opt_tokenizer() if family == "opt" else tiny.t5_tokenizer()
    reads = tiny.instruction_tokenizer().to_str() if other == "instructed" else None
    checkpoint.save(model, folder, tokenizer=tokenizer.to_str(), qformer_tokenizer=reads)
    tensors = weights(folder)
    for name, tensor in tensors.items():
        tensor.copy_(torch.randn_like(tensor))
        if name.endswith("qkv.bias") and not is_clip:
            tensor.chunk(3)[1].zero_()
    save_file(tensors, folder / "model.safetensors")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder by their published names."""
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names, precisions and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def random(*shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(shape)


def lavis_file(path: Path, state: dict[str, Tensor], **others: object) -> Path:
    """A file as LAVIS writes it."""
    torch.save({"model": state, **others}, path)
    return path


def state_of(path: Path) -> dict[str, Tensor]:
    """The weights of a LAVIS file by their names in it."""
    return torch.load(path, weights_only=True)["model"]


def written(folder: Path, path: Path, *, trainable_only: bool = True) -> dict[str, Tensor]:
    """The weights of a model by the names that LAVIS gives them, ``path`` being written on the way."""
    convert_to_lavis(folder, path, trainable_only=trainable_only)
    return state_of(path)
