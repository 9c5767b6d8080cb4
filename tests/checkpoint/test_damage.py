"""Weights that are NaN or infinite: named where they are quantised, and after the fact where they are not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint, native
from blip2.errors import CheckpointError

NAMES = {  # of one linear layer of the language model; of the image encoder
    "opt": "language_model.model.decoder.layers.1.self_attn.v_proj.weight",
    "t5": "language_model.decoder.block.1.layer.1.EncDecAttention.v.weight",
    "llama": "language_model.model.layers.1.self_attn.v_proj.weight",
}
VISION = "vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture
def damaged(any_model: Path, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """A copy of a tiny model with one value that is no number, and the name of the tensor that has it."""

    def make(name: str | None = None, value: float = math.nan, dtype: torch.dtype = torch.float32) -> tuple[Path, str]:
        folder = Path(shutil.copytree(any_model, tmp_path / "model"))
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
        [name] = [each for each in (name, *NAMES.values()) if each in tensors][:1]
        tensors[name].view(-1)[-1] = value
        save_file(tensors, folder / "model.safetensors")
        return folder, name

    return make


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_weight_that_cannot_be_quantised_is_named(damaged, monkeypatch, kind, value, kernels):
    folder, name = damaged(value=value, dtype=torch.bfloat16)
    if not kernels:
        monkeypatch.setattr(native, "kernels", lambda: None)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(folder, quantize=kind)
    assert str(raised.value) == (
        f"{folder / 'model.safetensors'}: {name}: a weight is NaN or infinite and cannot be quantised; "
        "fetch the file again"
    )


def test_a_scale_that_is_no_number_is_named(any_model, tmp_path):
    model = checkpoint.load(any_model, quantize="int4", as_stored=True)
    checkpoint.save(model, tmp_path / "model", tokenizer=any_model / "tokenizer.json")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = [name for name in tensors if name.endswith(".scales")][3]
    tensors[name][0, 0, 5] = math.inf
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: a scale is NaN or infinite; fetch the file again"):
        checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_damage_is_named_as_it_is_called_here_and_in_files(damaged, value):
    folder, name = damaged(value=value)
    model = checkpoint.load(folder)
    ours = "language.blocks.1.qkv.weight" if "layers" in name else "language.decoder.1.cross_attention.key_value.weight"
    told = f"{ours} (in files: {name}) has such values: the model is damaged, download it again"
    assert checkpoint.damage(model) == told


def test_what_does_not_fit_float16_is_damage_with_a_remedy(damaged):
    folder, _ = damaged(VISION, 1e6)
    model = checkpoint.load(folder)
    assert checkpoint.damage(model) is None
    assert "numbers overflow, though no weight is NaN" in checkpoint.why_not_finite(model)
    model.vision.half()
    assert checkpoint.damage(model) == (
        f"vision.blocks.0.fc1.weight (in files: {VISION}) has such values: it is damaged, or overflows in float16; "
        "load the model in bfloat16"
    )
    model.vision.blocks[0].fc1.weight.data.zero_()
    assert checkpoint.why_not_finite(model) == "numbers overflow in float16; load the model in bfloat16 or float32"


def test_damage_of_a_scalar_and_of_scales(matching_model, opt_model):
    matcher = checkpoint.load(matching_model)
    matcher.itm_head.bias.data[1] = math.nan
    assert checkpoint.damage(matcher) == "itm_head.bias has such values: the model is damaged, download it again"
    quantized = checkpoint.load(opt_model, quantize="int8")
    quantized.language.blocks[0].fc2.scales[0, 0, 0] = math.nan
    assert checkpoint.damage(quantized).startswith(
        "language.blocks.0.fc2.scales (in files: language_model.model.decoder.layers.0.fc2.weight.scales) has"
    )
