"""Models whose image encoder multiplies in 8 bits: loaded, kept, described, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import blip2
from blip2 import checkpoint, placement
from blip2.checkpoint.describe import describe
from blip2.checkpoint.quantize import Quantization, quantization_in, quantization_of
from blip2.errors import CheckpointError, OptionError
from blip2.published import PUBLISHED
from blip2.quantized import QuantizedLinear
from tests import tiny

IMAGES = Quantization(8, parts=(), images=True)
WITH = {None: IMAGES, "int8": Quantization(8, images=True), "int4": Quantization(4, images=True)}


def layers_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Of each quantised layer the bits of weights and activations."""
    return {
        name: (layer.bits, layer.activation_bits)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


@pytest.mark.parametrize("kind", WITH)
def test_what_is_quantised(any_model: Path, kind: str | None) -> None:
    pipeline = blip2.load(any_model, quantize=kind, vision="int8")
    layers = layers_of(pipeline.speaker.model)
    vision = {name for name in layers if name.startswith("vision.")}
    assert vision == {f"vision.blocks.0.{name}" for name in ("qkv", "projection", "fc1", "fc2")}
    assert all(layers[name] == (8, 8) for name in vision)
    alone = blip2.load(any_model, quantize=kind)
    assert {name: bits for name, bits in layers.items() if name not in vision} == layers_of(alone.speaker.model)
    assert quantization_of(pipeline.speaker.model) == checkpoint.quantization(kind, images="int8") == WITH[kind]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_query_vectors_are_nearly_the_same(any_model: Path, pictures: list[str], dtype: str | None) -> None:
    exact = [seen.queries_QD.float() for seen in blip2.load(any_model).encode(pictures)]
    ours = blip2.load(any_model, vision="int8", dtype=dtype).encode(pictures)
    for seen, expected in zip(ours, exact, strict=True):
        assert 0 < (seen.queries_QD.float() - expected).norm() / expected.norm() < 0.03


def test_a_matching_model_sees_in_8_bits_as_well(matching_model: Path, pictures: list[str]) -> None:
    exact, ours = blip2.load(matching_model), blip2.load(matching_model, vision="int8")
    assert set(layers_of(ours.model).values()) == {(8, 8)}
    text = "two dogs and a red car"
    found, expected = (matcher.match(pictures, [text]).itc_cosine for matcher in (ours, exact))
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", WITH)
def test_what_is_saved_is_loaded(any_model: Path, kind: str | None, tmp_path: Path) -> None:
    model = checkpoint.load(any_model, quantize=WITH[kind])
    checkpoint.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["images"] is True
    assert quantization_in(tmp_path) == quantization_in(tmp_path, IMAGES) == WITH[kind]
    again = checkpoint.load(tmp_path)
    assert layers_of(again) == layers_of(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_of_a_checkpoint_whose_language_model_is_quantised(any_model: Path, kind: str, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(any_model, quantize=kind), tmp_path)
    assert "images" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    expected = checkpoint.load(any_model, quantize=WITH[kind]).state_dict()
    for asked in (IMAGES, WITH[kind]):
        found = checkpoint.load(tmp_path, quantize=asked).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    other = "int4" if kind == "int8" else "int8"
    with pytest.raises(OptionError, match=r"already quantised to \d bits"):
        checkpoint.load(tmp_path, quantize=WITH[other])


def test_of_a_checkpoint_whose_image_encoder_is_quantised(opt_model: Path, tmp_path: Path) -> None:
    for bits in (8, 4):
        stored = Quantization(bits, parts=("language", "vision"))
        checkpoint.save(checkpoint.load(opt_model, quantize=stored), tmp_path / str(bits))
    found = checkpoint.load(tmp_path / "8", quantize=IMAGES)
    assert layers_of(found)["vision.blocks.0.fc1"] == (8, 8)
    expected = checkpoint.load(opt_model, quantize=WITH["int8"]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    with pytest.raises(OptionError, match="image encoder is quantised to 4 bits, and cannot be multiplied in 8"):
        checkpoint.load(tmp_path / "4", quantize=IMAGES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_told_by_its_name(opt_model: Path, tmp_path: Path, value: float) -> None:
    folder = tiny.save_generative("opt", tmp_path)
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = "vision_model.encoder.layers.0.mlp.fc2.weight"
    tensors[name][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: a weight is NaN or infinite and cannot be quantised"):
        blip2.load(folder, vision="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": "int4"}, "vision is 'int4'; use int8, or leave it out"),
        ({"vision": "int8", "quantize": "int8", "quantize_vision": True}, "quantize_vision is set together"),
    ],
)
def test_what_cannot_be_asked_for(opt_model: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        blip2.load(opt_model, **options)


def test_not_on_a_gpu(opt_model: Path) -> None:
    for ask in (
        lambda: placement.plan_for(opt_model, free_bytes=8_000_000_000, quantize=IMAGES),
        lambda: describe(checkpoint.read_config(opt_model), device=torch.device("cuda"), quantization=IMAGES),
        lambda: checkpoint.load(opt_model, device="meta", quantize=IMAGES),
    ):
        with pytest.raises(OptionError, match=r"an image encoder in int8 .* is for the CPU"):
            ask()


@pytest.mark.parametrize(
    "damage", [{"images": 1}, {"images": "yes"}, {"images": True}, {"parts": []}, {"parts": [], "images": False}]
)
def test_what_config_json_cannot_say(opt_model: Path, tmp_path: Path, damage: dict[str, object]) -> None:
    checkpoint.save(checkpoint.load(opt_model, quantize=Quantization(8, parts=("vision",))), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] |= damage
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="quantization_config is"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("kind", WITH)
def test_the_description_is_what_loading_makes(any_model: Path, kind: str | None) -> None:
    told = describe(checkpoint.read_config(any_model), quantization=WITH[kind])
    model = checkpoint.load(any_model, quantize=WITH[kind])
    assert told.num_bytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert told.quantized == {name: bits for name, (bits, _) in layers_of(model).items()}
    plan = placement.plan_for(any_model, device="cpu", quantize=WITH[kind])
    assert plan.num_bytes("cpu") == told.num_bytes


def test_the_published_image_encoder_is_half_as_large() -> None:
    config = PUBLISHED["Salesforce/blip2-flan-t5-xl"].config
    sizes = [
        next(part.num_bytes for part in describe(config, dtype=torch.bfloat16, quantization=how).parts)
        for how in (None, IMAGES)
    ]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)
