"""A model with a weight that is NaN: every command says which, in one line, and writes nothing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

OPT = "language_model.model.decoder.layers.1.fc2.weight"
VISION = "vision_model.encoder.layers.0.mlp.fc1.bias"


def damaged(model: Path, name: str, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[2] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption", "PICTURE", "PICTURE"),
        ("caption", "PICTURE", "--beams", "1"),
        ("ask", "PICTURE", "how many dogs?"),
        ("ask", "PICTURE", "is it day?", "--choices", "yes,no"),
        ("explain", "PICTURE", "--question", "how many dogs?", "--json"),
    ],
)
def test_a_generative_one(run, opt_model, pictures, tmp_path, arguments):
    model = damaged(opt_model, OPT, tmp_path / "model")
    result = run(*(pictures[0] if each == "PICTURE" else each for each in arguments), "--model", model)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert f"language.blocks.1.fc2.weight (in files: {OPT}) has such values" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_matching_one(run, matching_model, pictures, tmp_path):
    model = damaged(matching_model, VISION, tmp_path / "model")
    result = run("match", pictures[0], "two dogs", "--model", model)
    assert result.exit_code == 1 and VISION in result.stderr, result.output
    result = run("index", *pictures, "-o", tmp_path / "photos.index", "--model", model)
    assert result.exit_code == 1 and VISION in result.stderr, result.output
    assert not (tmp_path / "photos.index").exists()


@pytest.mark.parametrize("name", [OPT, VISION])
def test_it_is_not_quantised(run, opt_model, tmp_path, name):
    """Whether what is damaged would be quantised or kept as it is."""
    model = damaged(opt_model, name, tmp_path / "model")
    result = run("quantize", model, tmp_path / "out", "--to", "int8")
    assert result.exit_code == 1 and name in result.stderr and "NaN or infinite" in result.stderr, result.output
    assert not (tmp_path / "out").exists()
