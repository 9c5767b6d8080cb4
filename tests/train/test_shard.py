"""Weights that processes have shares of: the numbers of one process that has all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip2 import checkpoint, train
from blip2.errors import RecipeError
from tests.train.processes import gradients, in_processes
from tests.train.test_distributed import FIFTY, UNEVEN, assert_same, assert_same_training

LANGUAGE = {"shard": ["language"]}
BOTH = {"shard": ["language", "vision"]}
LORA = {"lora.parts": ["language", "vision", "qformer"], "lora.base": "fp32", "lora.rank": 2}


@pytest.fixture
def recipe(write_recipe, opt_model):
    return without_features(write_recipe(2, opt_model))


def without_features(path):
    path.write_text(path.read_text().replace('features = "features"', ""))
    return path


def compute(path, tmp_path, cases, training=None):
    """What two processes find in each case, beside what one finds."""
    cases = [{"path": str(path)} | case for case in cases]
    in_processes(2, tmp_path / "found.pt", json.dumps(cases), json.dumps(training))
    for case, found in zip(cases, torch.load(tmp_path / "found.pt"), strict=True):
        changes = {name: value for name, value in case.items() if name not in ("path", "shard", "optim.accumulate")}
        assert_same(found, gradients(path, changes))


def test_two_processes_with_a_half_each_learn_what_one_does(recipe, tmp_path):
    """Losses and gradients, of a frozen language model and a frozen image encoder, with adapters in both or without,
    in parts that do not divide evenly; and fifty steps with evaluations."""
    cases = [BOTH | UNEVEN | {"optim.accumulate": 7}, BOTH | LORA | UNEVEN]
    training = {"path": str(recipe), "out": "shared"} | FIFTY | UNEVEN | BOTH
    compute(recipe, tmp_path, cases, training)
    alone = train.run(recipe, overrides=FIFTY | UNEVEN)
    assert_same_training(tmp_path / "shared", alone)
    assert (tmp_path / "shared/config.json").read_bytes() == (alone / "config.json").read_bytes()
    assert checkpoint.load(tmp_path / "shared").config == checkpoint.load(alone).config


@pytest.mark.slow
def test_in_bf16(recipe, tmp_path):
    """To the bit what two processes compute that have all of the weights."""
    case = {"path": str(recipe), "precision": "bf16"}
    in_processes(2, tmp_path / "found.pt", json.dumps([case | BOTH, case]), "null")
    (losses, found), (wanted_losses, wanted) = torch.load(tmp_path / "found.pt")
    assert losses == wanted_losses and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.slow
def test_other_language_models(write_recipe, any_model, tmp_path):
    """Of a T5, which reads the texts of an image apart, the adapters' dropout does not follow the rows."""
    whole = LORA | {"lora.dropout": 0.0}
    compute(without_features(write_recipe(2, any_model)), tmp_path, [BOTH | UNEVEN, BOTH | whole])


@pytest.mark.slow
def test_an_image_encoder_that_learns(tmp_path):
    """Its gradients are summed and clipped, changed, saved and read as those of one process."""
    learn(1, tmp_path / "one.pt")
    learn(2, tmp_path / "two.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert two["first"] == one["first"] == 3
    assert two["shares"] and not one["shares"]
    for kind in ("weights", "state", "again"):
        assert two[kind].keys() == one[kind].keys()
        for name, value in one[kind].items():
            if name.endswith("qkv.bias"):  # that of keys moves no attention: its gradient is rounding
                continue
            torch.testing.assert_close(two[kind][name], value, rtol=0, atol=1e-5, msg=f"{kind} {name}")


def learn(number, out):
    in_processes(number, out, module="tests.train.learning_shares")


@pytest.mark.slow
def test_memory(tmp_path, monkeypatch):
    """A process has half of the language model, one product of it whole, and what torch needs for that."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # what is freed goes back to the system, and is not counted
    found = {}
    for parts in ("", "language"):
        told = in_processes(2, parts, module="tests.train.memory_of_shares")
        found[parts] = max(json.loads(out)["mb"] for out, _ in told)
        size = json.loads(told[0][0])["model_mb"]
    assert found[""] - found["language"] > 0.3 * size, (found, size)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shard": ["qformer"]}, "shard: names 'qformer'; stage 2 has vision, language"),
        ({"shard": "language", "lora.base": "int8"}, "shard: cannot shard a language model in int8"),
        ({"shard": "vision", "data.features": "features"}, "shard: names the image encoder, which with data.features"),
    ],
)
def test_what_cannot_be_shared_out(recipe, changes, problem):
    with pytest.raises(RecipeError, match=problem):
        train.run(recipe, overrides=changes)


def test_one_process_has_all(recipe):
    one = train.run(recipe, overrides={"out": "one"})
    assert_same_training(train.run(recipe, overrides={"out": "alone"} | LANGUAGE), one)


def test_importing_the_package_does_not_import_what_shares_need():
    check = "import sys, blip2.train; print('torch.distributed.fsdp' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "False"
