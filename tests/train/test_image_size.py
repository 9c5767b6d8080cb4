"""Another image size: positions as the authors interpolate them, and a folder that loads at the new size."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

import blip2
from blip2 import checkpoint, train
from blip2.checkpoint.save import texts_of, write_model
from blip2.checkpoint.tensors import named_tensors
from blip2.config import VisionConfig
from blip2.errors import RecipeError
from blip2.image import load_image, to_pixels
from blip2.model import Blip2Matcher
from blip2.train.seeing import resize
from tests.train.finetuned import resized_positions


def authors_positions(pos_embed, num_patches):
    """``interpolate_pos_embed`` of ``eva_vit.py``, which interpolates by torch."""
    extra, grid = pos_embed[:, :1], pos_embed[:, 1:]
    size, width = int(grid.shape[1] ** 0.5), grid.shape[-1]
    grid = grid.reshape(-1, size, size, width).permute(0, 3, 1, 2)
    new = int(num_patches**0.5)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([extra, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@pytest.mark.parametrize(("old", "new"), [(224, 364), (224, 490), (364, 224), (28, 42)])
def test_positions_are_the_authors(matching_model, old, new):
    vision = VisionConfig(hidden_size=6, num_layers=1, num_heads=1, intermediate_size=8, image_size=old, patch_size=14)
    model = Blip2Matcher(replace(checkpoint.read_config(matching_model), vision=vision))
    before = model.vision.position_embedding.detach().clone()
    resize(model, new)
    found = model.vision.position_embedding.detach()
    assert model.config.vision.image_size == model.vision.config.image_size == new
    torch.testing.assert_close(found, authors_positions(before, (new // 14) ** 2), rtol=0, atol=1e-7)
    torch.testing.assert_close(found, resized_positions(before, new // 14), rtol=0, atol=1e-6)
    assert torch.equal(found[:, 0], before[:, 0])


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_folder_is_of_the_new_size(write_recipe, matching_model, opt_model, pictures, stage, features):
    """Configuration, weights and settings; a frozen encoder's features may be kept all the same."""
    start = matching_model if stage == 1 else opt_model
    path = write_recipe(stage, start)
    if not features:
        path.write_text(path.read_text().replace('features = "features"', ""))
    out = train.run(path, overrides={"vision.image_size": 80})
    config, settings = checkpoint.read_config(out), checkpoint.image_settings(out, checkpoint.read_config(out))
    assert (config.vision.image_size, settings.size) == (80, 80)
    assert replace(config.vision, image_size=32) == checkpoint.read_config(start).vision
    before, after = checkpoint.load(start).vision, checkpoint.load(out).vision
    assert after.position_embedding.shape[1] == 26
    wanted = authors_positions(before.position_embedding.detach(), 25)
    torch.testing.assert_close(after.position_embedding.detach(), wanted, rtol=0, atol=1e-7)
    pixels_BCHW = to_pixels([load_image(pictures[0])], size=80, mean=settings.mean, std=settings.std)
    with torch.no_grad():
        torch.testing.assert_close(after.features(pixels_BCHW), before.features(pixels_BCHW))
    if stage == 2:
        assert isinstance(blip2.load(out).caption(pictures[0]), str)
        theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(out).eval()
        with torch.no_grad():
            found = theirs.vision_model(pixel_values=pixels_BCHW).last_hidden_state
            torch.testing.assert_close(after(pixels_BCHW), found, rtol=1e-4, atol=1e-5)
        assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"height": 80, "width": 80}


def test_a_crop_grows_with_the_picture(write_recipe, opt_model, tmp_path):
    start = tmp_path / "cropped"
    model = checkpoint.load(opt_model)
    settings = checkpoint.ImageSettings(32, shortest_edge=36)
    checkpoint.save(model, start, tokenizer=opt_model / "tokenizer.json", settings=settings)
    found = checkpoint.image_settings(train.run(write_recipe(2, start), overrides={"vision.image_size": 80}))
    assert (found.size, found.shortest_edge) == (80, 90)


@pytest.mark.parametrize("size", [70, 8, 10**6])
def test_what_is_no_size_is_told(write_recipe, opt_model, size):
    problem = r"vision\.image_size: \d+ is not a multiple of the patch size \(16 pixels\).*set it"
    with pytest.raises(RecipeError, match=problem) as raised:
        train.run(write_recipe(2, opt_model), overrides={"vision.image_size": size})
    assert "\n" not in str(raised.value)
    if size == 70:
        assert str(raised.value).endswith("set it to 64 or 80")


def test_features_of_another_size_are_others(write_recipe, opt_model):
    train.run(write_recipe(2, opt_model))
    with pytest.raises(RecipeError, match="features"):
        train.run(write_recipe(2, opt_model), overrides={"vision.image_size": 80, "out": "other"})


def test_frozen_files_are_shared_but_for_what_has_learnt(write_recipe, opt_model, tmp_path):
    """What is linked to the start's is what is as it was there."""
    model = checkpoint.load(opt_model)
    start = tmp_path / "parts"
    tensors = list(named_tensors(model))
    sizes = [(name, tensor.nbytes) for name, tensor in tensors]
    write_model(start, sizes, iter(tensors), texts_of(model, opt_model / "tokenizer.json", None, None), apart=True)
    frozen = train.run(write_recipe(2, start), overrides={"out": "frozen"})
    path = write_recipe(2, start)
    path.write_text(path.read_text().replace('features = "features"', ""))
    learnt = train.run(path, overrides={"out": "learnt", "vision.learns": True})
    larger = train.run(path, overrides={"out": "larger", "vision.image_size": 48})

    def is_shared(out, part):
        return (out / f"{part}.safetensors").samefile(start / f"{part}.safetensors")

    assert is_shared(frozen, "vision_model") and is_shared(frozen, "language_model")
    for out in (learnt, larger):
        assert not is_shared(out, "vision_model") and is_shared(out, "language_model")
    fc1 = [checkpoint.load(folder).vision.blocks[0].fc1.weight for folder in (start, frozen, learnt)]
    assert torch.equal(fc1[0], fc1[1]) and not torch.equal(fc1[0], fc1[2])
