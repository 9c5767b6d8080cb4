"""A BLIP-2 with an image encoder of another family: written, read, quantised, looked into, in our layout."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import blip2
from blip2 import checkpoint
from blip2.checkpoint.preprocessor import preprocessor_json
from blip2.checkpoint.settings import config_json
from blip2.compat import Blip2ForConditionalGeneration, Blip2Processor
from blip2.config import Blip2Config, VisionConfig
from blip2.errors import CheckpointError, OptionError
from blip2.image import to_pixels
from blip2.index.update import identity_of
from blip2.model import Blip2
from tests import tiny
from tests.parity import encoders

SIZES = {
    "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 7, "image_size": 30,
    "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
MORE = {
    "DINOv2": {"mlp_ratio": 2},
    "DINOv2 with registers": {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True},
    "DINOv3": {"intermediate_size": 40, "num_register_tokens": 2},
}
WIDE = {"intermediate_size": 40}


def save_encoder(family: str, folder: Path, size: int = 30) -> torch.nn.Module:
    model = encoders.build(family, SIZES | MORE.get(family, WIDE), seed=5)
    encoders.save(model, family, folder, size)
    return model


def assemble(folder: Path, encoder: Path, **options) -> Path:
    """A tiny generative model that sees with the encoder."""
    vision, settings = checkpoint.load_encoder(encoder, **options)
    like = tiny.generative("opt")
    qformer = replace(tiny.QFORMER, encoder_hidden_size=vision.config.hidden_size)
    model = Blip2(replace(like.config, vision=vision.config, qformer=qformer))
    model.qformer.reset_parameters(std=0.3)
    model.language, model.projection, model.vision = like.language, like.projection, vision
    checkpoint.save(model.eval(), folder, tokenizer=tiny.opt_tokenizer().to_str(), settings=settings)
    return folder


@pytest.fixture(scope="module", params=encoders.FAMILIES)
def seen_by(request, tmp_path_factory):
    """Family, the reference's encoder, and the folder of a BLIP-2 that sees with it."""
    folder = tmp_path_factory.mktemp("family")
    theirs = save_encoder(request.param, folder / "encoder", size=32)
    return request.param, theirs, assemble(folder / "model", folder / "encoder")


def test_written_and_read(seen_by, tmp_path):
    family, theirs, folder = seen_by
    pipeline = blip2.load(folder)
    found = pipeline.speaker.model
    assert checkpoint.read_config(folder) == found.config
    pixels_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted_BPD = encoders.reference(theirs, family, pixels_BCHW, "second-last", class_token=True)
    with torch.inference_mode():
        torch.testing.assert_close(found.vision.features(pixels_BCHW), wanted_BPD, rtol=1e-4, atol=1e-4)
    pictures = [tiny.picture(seed, size=50) for seed in range(3)]
    assert len(pipeline.caption(pictures)) == 3
    assert pipeline.caption(pictures[0]) == pipeline.caption(pictures)[0]
    checkpoint.save(found, tmp_path, settings=checkpoint.image_settings(folder))
    assert checkpoint.image_settings(tmp_path) == checkpoint.image_settings(folder)
    for name, weight in checkpoint.load(tmp_path).state_dict().items():
        assert torch.equal(weight, found.state_dict()[name]), name


def test_under_the_names_of_the_reference(seen_by):
    _, _, folder = seen_by
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (41, 67, 3), np.uint8))
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    pipeline = blip2.load(folder)
    pixels_BCHW = processor(images=picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels_BCHW[0], pipeline.frontend.pixels(picture), rtol=0, atol=0.02)
    with torch.inference_mode():
        states_BPD = model.vision_model(pixels_BCHW).last_hidden_state
        torch.testing.assert_close(states_BPD, pipeline.speaker.model.vision(pixels_BCHW))


@pytest.mark.parametrize("options", [{"quantize": "int8", "quantize_vision": True}, {"vision": "int8"}])
def test_quantised(seen_by, options):
    _, _, folder = seen_by
    pixels_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole, small = (blip2.load(folder, **each).speaker.model for each in ({}, options))
    with torch.inference_mode():
        exact_BPD, rough_BPD = whole.vision(pixels_BCHW), small.vision(pixels_BCHW)
    error = (rough_BPD - exact_BPD).norm() / exact_BPD.norm()
    assert 0 < error < 0.05


def test_an_explanation_shows_the_whole_picture(seen_by):
    family, _, folder = seen_by
    picture = tiny.picture(2, size=60).resize((60, 90))
    found = blip2.load(folder).explain(picture, question="how many dogs?", answer="two")
    assert found.heat.shape == (90, 60)
    if family in ("CLIP", "DINOv2", "DINOv2 with registers"):  # of the shorter side 32 of 36, in the middle
        assert not found.heat[:15].any() and not found.heat[:, :3].any() and found.heat[20:70].any()


def test_a_model_of_the_published_kind_is_the_references_too(tmp_path):
    """The layer scale is in the weights: what is left of a DINOv2 or a ViT is what the published layout has."""
    for family in ("DINOv2", "ViT"):
        save_encoder(family, tmp_path / family)
        folder = assemble(tmp_path / f"{family} model", tmp_path / family)
        theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
        pixels_BCHW = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            wanted_BPD = theirs.vision_model(pixels_BCHW).last_hidden_state
            torch.testing.assert_close(checkpoint.load(folder).vision(pixels_BCHW), wanted_BPD, rtol=1e-4, atol=1e-4)
        assert json.loads((folder / "config.json").read_text())["vision_config"]["model_type"] == "blip_2_vision_model"


def test_what_the_published_layout_has_no_words_for_is_said(tmp_path):
    save_encoder("SigLIP", tmp_path / "encoder")
    folder = assemble(tmp_path / "model", tmp_path / "encoder")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    assert (vision["model_type"], vision["num_prefix_tokens"]) == ("blip2_vision_transformer", 0)
    from blip2.checkpoint.lavis import convert_to_lavis

    with pytest.raises(CheckpointError, match="LAVIS has no image encoder of this kind"):
        convert_to_lavis(folder, tmp_path / "whole.pth", trainable_only=False)
    convert_to_lavis(folder, tmp_path / "trained.pth")


def test_the_encoder_of_a_blip2_is_read_again(tmp_path):
    for family in ("SigLIP", "DINOv3"):
        save_encoder(family, tmp_path / family)
        folder = assemble(tmp_path / f"{family} model", tmp_path / family)
        vision, settings = checkpoint.load_encoder(folder)
        again, first = checkpoint.load_encoder(tmp_path / family)
        assert settings == first and vision.config == again.config
        for name, weight in again.state_dict().items():
            assert torch.equal(weight, vision.state_dict()[name]), (family, name)


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_larger_pictures(family, tmp_path):
    theirs = save_encoder(family, tmp_path)
    ours, settings = checkpoint.load_encoder(tmp_path, image_size=44)
    assert settings.size == ours.config.image_size == 44
    pixels_BCHW = torch.randn(1, 3, 44, 44, generator=torch.Generator().manual_seed(1))
    wanted_BPD = encoders.reference(theirs, family, pixels_BCHW, "second-last", class_token=True)
    with torch.inference_mode():
        torch.testing.assert_close(ours.features(pixels_BCHW), wanted_BPD, rtol=1e-4, atol=1e-4)


# ---- image settings ----


PROCESSORS = {
    "CLIP": transformers.CLIPImageProcessorPil,
    "DINOv2": transformers.BitImageProcessorPil,
    "SigLIP": transformers.SiglipImageProcessorPil,
    "ViT": transformers.ViTImageProcessorPil,
}


@pytest.mark.parametrize("family", PROCESSORS)
def test_pixels_are_those_of_the_familys_processor(family, tmp_path):
    chance = random.Random(family)
    for number in range(12):
        size = chance.randint(8, 60)
        content = encoders.settings(family, size)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        settings = checkpoint.image_settings(tmp_path)
        theirs = PROCESSORS[family].from_pretrained(tmp_path)
        height, width = chance.randint(5, 90), chance.randint(5, 90)
        colours = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        picture = Image.fromarray(colours)
        found = to_pixels(
            [picture], size=settings.size, mean=settings.mean, std=settings.std, resample=settings.resample,
            shortest_edge=settings.shortest_edge,
        )  # fmt: skip
        wanted = theirs(picture, return_tensors="pt")["pixel_values"]
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)
        again = preprocessor_json(settings)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(again))
        assert checkpoint.image_settings(tmp_path) == settings


@pytest.mark.parametrize(
    ("content", "size", "shortest_edge", "resample"),
    [
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}, 336, 336, "bicubic"),
        ({"image_processor_type": "CLIPImageProcessorFast"}, 224, 224, "bicubic"),
        ({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256},
          "crop_size": {"height": 224, "width": 224}}, 224, 256, "bicubic"),
        ({"image_processor_type": "ViTFeatureExtractor", "size": 224}, 224, None, "bilinear"),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}}, 384, None, "bicubic"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": 224}, 224, None, "bicubic"),
    ],
)  # fmt: skip
def test_settings_as_they_were_published(content, size, shortest_edge, resample, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = checkpoint.image_settings(tmp_path)
    assert (found.size, found.shortest_edge, found.resample) == (size, shortest_edge, resample)


def test_a_crop_that_is_larger_than_the_picture_is_refused(tmp_path):
    content = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 200}, "crop_size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="crop_size is 224 and size"):
        checkpoint.image_settings(tmp_path)


def test_a_picture_of_one_row_is_cut_without_making_it_long(tmp_path):
    [pixels_CHW] = to_pixels(
        [Image.new("RGB", (60_000, 1), "red")], size=224, mean=[0] * 3, std=[1] * 3, shortest_edge=256
    )
    assert pixels_CHW.shape == (3, 224, 224) and (pixels_CHW[0] == 1).all()


def test_indexes_and_features_know_how_pictures_are_seen(tmp_path):
    save_encoder("DINOv2", tmp_path / "encoder")
    kept, dropped = (
        assemble(tmp_path / name, tmp_path / "encoder", class_token=keeps)
        for name, keeps in (("kept", True), ("dropped", False))
    )
    settings = json.loads((kept / "preprocessor_config.json").read_text())
    identities = {identity_of(blip2.load(kept)), identity_of(blip2.load(dropped))}
    (kept / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"shortest_edge": 40}}))
    assert len(identities | {identity_of(blip2.load(kept))}) == 3


def test_what_was_made_before_is_known_by_the_same_words():
    assert repr(VisionConfig()) == (
        "VisionConfig(hidden_size=1408, num_layers=39, num_heads=16, intermediate_size=6144, image_size=224, "
        "patch_size=14, layer_norm_eps=1e-06, activation='gelu', has_patch_bias=True, has_pre_norm=False)"
    )
    assert repr(VisionConfig(rotary_base=10.0)).endswith("has_pre_norm=False, rotary_base=10.0)")
    assert "num_prefix_tokens" not in config_json(Blip2Config())["vision_config"]


# ---- what is wrong is told ----


def change(folder: Path, file: str, **values) -> None:
    content = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("ViT", {"model_type": "resnet"}, "'resnet', which is not a supported image encoder; supported are blip-2"),
        ("SigLIP", {"model_type": "siglip2_vision_model"}, "without NaFlex"),
        ("ViT", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("ViT", {"num_channels": 1}, "num_channels is 1"),
        ("ViT", {"hidden_size": "24"}, "hidden_size is '24'"),
        ("DINOv2", {"hidden_size": "24"}, "hidden_size is '24'"),
        ("DINOv2", {"mlp_ratio": -1}, "mlp_ratio is -1"),
        ("ViT", {"image_size": [30, 60]}, "image_size is "),
        ("DINOv3", {"num_register_tokens": True}, "num_register_tokens is True"),
        ("DINOv3", {"num_attention_heads": 4}, "heads of 6 dimensions cannot have rotary positions"),
        ("ViT", {"hidden_size": 26}, r"cls_token has shape \[1, 1, 24\], but config.json requires \[1, 1, 26\]"),
        ("ViT", {"num_hidden_layers": 4}, "encoder.layer.3. is missing"),
        ("ViT", {"num_hidden_layers": 2}, "encoder.layer.2.* is unexpected"),
        ("ViT", {"qkv_bias": False}, "bias is unexpected"),
        ("DINOv2", {"use_swiglu_ffn": True}, "mlp.weights_in.weight is missing"),
        ("DINOv2", {"model_type": "dinov2_with_registers"}, "embeddings.register_tokens is missing"),
        ("CLIP", {"model_type": "siglip_vision_model"}, "is missing|is unexpected|requires"),
        ("CLIP", {"num_hidden_layers": 1}, "there is no second-last layer"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(family, values, message, tmp_path):
    save_encoder(family, tmp_path)
    change(tmp_path, "config.json", **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load_encoder(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_options_that_cannot_be(tmp_path):
    save_encoder("EVA-CLIP", tmp_path)
    with pytest.raises(OptionError, match="does not contain the last layer"):
        checkpoint.load_encoder(tmp_path, layer="last")
    with pytest.raises(OptionError, match=r"layer.* is 'first'; use second-last or last"):
        checkpoint.load_encoder(tmp_path, layer="first")
    with pytest.raises(OptionError, match=r"image_size.* is 0"):
        checkpoint.load_encoder(tmp_path, image_size=0)
