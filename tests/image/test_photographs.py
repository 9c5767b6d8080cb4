"""Photographs as people have them (NOTICE names their authors): read, seen, described, found, none failing."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import blip2
from blip2.image import load_image, to_pixels

FOLDER = Path(__file__).parents[1] / "photographs"
FILES = sorted(FOLDER.glob("*.jpg"))


def test_they_are_few_and_small_and_each_has_a_credit():
    assert 30 <= len(FILES) <= 40 and sum(file.stat().st_size for file in FILES) <= 400_000
    notice = (FOLDER.parents[1] / "NOTICE").read_text("utf-8")
    assert [file.name for file in FILES if f"- {file.name}: " not in notice] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_becomes_pixels(file):
    [pixels] = to_pixels([load_image(file)], size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert pixels.shape == (3, 64, 64) and pixels.isfinite().all() and pixels.std() > 0.05


def test_the_bundled_model_describes_all_of_them_and_together_as_alone():
    pipeline = blip2.load()
    said = pipeline.caption(FILES)
    assert len(said) == len(FILES) and all(said)
    assert pipeline.caption(FILES[3]) == said[3]
    assert pipeline.caption(Image.open(FILES[3])) == said[3]


def test_the_bundled_matcher_compares_all_of_them():
    found = blip2.load("miniature-itm").classify(FILES, ["a dog", "a house"])
    assert len(found) == len(FILES)
    shares = torch.tensor([[match.itm_probability for match in matches] for matches in found])
    assert shares.isfinite().all() and shares.shape == (len(FILES), 2)
