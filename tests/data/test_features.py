"""Frozen features on disk: what the encoder says, computed once, and never for the wrong model."""

import json

import pytest
import torch

from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.data import Pictures, Row, frozen_features
from blip2.data.features import fingerprint
from blip2.errors import RecipeError
from blip2.vision import VisionTransformer
from tests.tiny import VISION


@pytest.fixture
def vision():
    torch.manual_seed(1)
    return VisionTransformer(VISION).eval()


@pytest.fixture
def shown(pictures):
    return Pictures([Row(path) for path in pictures], size=32, mean=CLIP_MEAN, std=CLIP_STD)


def test_they_are_the_encoders(vision, shown, tmp_path):
    file = frozen_features(vision, shown, tmp_path, "rows", batch_size=3)
    assert len(file) == 8
    numbers = torch.tensor([5, 0, 5])
    with torch.no_grad():
        wanted = vision.features(shown.pixels(numbers))
    found = file.read(numbers.numpy())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)


def test_they_are_computed_once(vision, shown, tmp_path, monkeypatch):
    done = []
    frozen_features(vision, shown, tmp_path, "rows", batch_size=3, report=lambda *counts: done.append(counts))
    assert done == [(3, 8), (6, 8), (8, 8)]
    monkeypatch.setattr(VisionTransformer, "features", None)
    vision.post_norm.weight.data += 1  # trained, and so no part of what is stored
    assert len(frozen_features(vision, shown, tmp_path, "rows")) == 8


def test_what_was_interrupted_goes_on(vision, shown, tmp_path):
    whole = frozen_features(vision, shown, tmp_path / "whole", "rows", batch_size=3).read(shown.number_of_row)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frozen_features(vision, shown, tmp_path, "rows", batch_size=3, report=interrupt)
    assert not (tmp_path / "rows.bin").exists()
    with (tmp_path / "rows.bin.partial").open("ab") as partial:
        partial.write(b"half a picture")
    done = []
    file = frozen_features(vision, shown, tmp_path, "rows", batch_size=3, report=lambda *c: done.append(c))
    assert done == [(6, 8), (8, 8)]
    assert torch.equal(file.read(shown.number_of_row), whole)


def test_another_encoder_and_other_pictures_are_refused(vision, shown, pictures, tmp_path):
    frozen_features(vision, shown, tmp_path, "rows")
    fewer = Pictures([Row(path) for path in pictures[:4]], size=32, mean=CLIP_MEAN, std=CLIP_STD)
    with pytest.raises(RecipeError, match="other pictures"):
        frozen_features(vision, fewer, tmp_path, "rows")
    vision.blocks[0].fc1.bias.data[0] += 1
    with pytest.raises(RecipeError, match="another image encoder"):
        frozen_features(vision, shown, tmp_path, "rows")


def test_a_file_that_was_cut_is_refused(vision, shown, tmp_path):
    frozen_features(vision, shown, tmp_path, "rows")
    path = tmp_path / "rows.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(RecipeError, match=r"rows\.bin: not of the size"):
        frozen_features(vision, shown, tmp_path, "rows")
    assert json.loads((tmp_path / "rows.json").read_text())["shape"] == [8, 5, 16]


def test_features_beyond_half_precision_are_refused(vision, shown, tmp_path):
    vision.blocks[0].fc2.bias.data[0] = 1e6
    with pytest.raises(RecipeError, match="half precision"):
        frozen_features(vision, shown, tmp_path, "rows")


def test_a_fingerprint_is_of_the_values(vision):
    before = fingerprint(vision)
    assert fingerprint(VisionTransformer(VISION)) != before
    vision.post_norm.bias.data += 1
    assert fingerprint(vision) == before


def test_a_damaged_encoder_is_named(vision, shown, tmp_path):
    vision.blocks[0].fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"blocks.0.fc1.weight of the image encoder is NaN or infinite"):
        frozen_features(vision, shown, tmp_path, "rows")
