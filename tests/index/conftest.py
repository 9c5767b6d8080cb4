"""A folder of images to change, models to see them with, and indexes of vectors that no model made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import blip2
from blip2.index.file import IndexedImage, Origin, crc32_of, write
from blip2.index.folders import Stamp
from tests import tiny


@pytest.fixture(scope="session")
def matcher(matching_model):
    return blip2.load(matching_model)


@pytest.fixture(scope="session")
def blip(opt_model):
    return blip2.load(opt_model)


@pytest.fixture(scope="session")
def other_matcher(tmp_path_factory):
    """A model of the same shape and other weights."""
    folder = tiny.save_matching(tmp_path_factory.mktemp("other"))
    weights = load_file(folder / "model.safetensors")
    weights["query_tokens"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return blip2.load(folder)


@pytest.fixture
def photos(tmp_path, pictures) -> Path:
    """Eight images, three of them in a folder within."""
    folder = tmp_path / "photos"
    (folder / "within").mkdir(parents=True)
    for number, path in enumerate(pictures):
        shutil.copy2(path, folder / "within" if number > 4 else folder)
    return folder


@pytest.fixture
def index_of(tmp_path):
    """``index_of(vectors_NQD)``: an open index of these, made unit; paths p0000, p0001, ..."""

    def make(vectors_NQD: torch.Tensor, name: str = "made.index") -> blip2.Index:
        half_NQD = F.normalize(vectors_NQD, dim=-1).half()
        rows = [IndexedImage(f"/p{row:04}", Stamp(1, 1), crc32_of(each)) for row, each in enumerate(half_NQD)]
        write(tmp_path / name, Origin("search", "none", "none"), rows, half_NQD.shape[1:], half_NQD)
        return blip2.Index.open(tmp_path / name)

    return make
