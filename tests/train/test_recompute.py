"""Activations that are computed again: the same losses and gradients, in less memory."""

import json
import re

import pytest
import torch

from blip2 import train
from blip2.errors import RecipeError
from tests.train.processes import gradients, in_processes

LORA = {"lora.parts": ["vision", "qformer"], "lora.base": "fp32", "lora.dropout": 0.3}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("stage", "parts", "changes"),
    [
        (1, ["qformer"], {"optim.accumulate": 2}),
        (1, ["qformer", "vision"], LORA),
        (2, ["language", "qformer"], {}),
        (2, ["language", "vision"], LORA),
    ],
)
def test_the_same_numbers(write_recipe, matching_model, opt_model, stage, parts, changes, autocast):
    """To the bit, dropout included."""
    path = write_recipe(stage, matching_model if stage == 1 else opt_model)
    path.write_text(path.read_text().replace('features = "features"', ""))
    options = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)} if autocast else {}
    losses, found = gradients(path, changes | {"checkpoint_activations": parts}, **options)
    wanted_losses, wanted = gradients(path, changes, **options)
    assert losses == wanted_losses and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_of_every_language_model(write_recipe, any_model):
    path = write_recipe(2, any_model)
    losses, found = gradients(path, {"checkpoint_activations": "language"})
    wanted_losses, wanted = gradients(path, {})
    assert losses == wanted_losses
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.slow
def test_with_shares(write_recipe, any_model, tmp_path):
    path = write_recipe(2, any_model)
    path.write_text(path.read_text().replace('features = "features"', ""))
    case = {"checkpoint_activations": ["language", "qformer"]}
    in_processes(2, tmp_path / "found.pt", json.dumps([{"path": str(path), "shard": ["language"]} | case]), "null")
    [(losses, found)] = torch.load(tmp_path / "found.pt")
    wanted_losses, wanted = gradients(path, {})
    assert losses == pytest.approx(wanted_losses, abs=1e-6)
    for name, gradient in wanted.items():
        if not name.endswith("key.bias"):
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_memory():
    """What is kept of a Q-Former for its gradient."""
    from blip2.config import QFormerConfig
    from blip2.qformer import QFormer
    from blip2.train.recompute import recompute

    config = QFormerConfig(hidden_size=64, num_layers=8, num_heads=4, intermediate_size=256, encoder_hidden_size=64)
    model = torch.nn.Module()
    model.qformer = QFormer(config).train()

    def kept():
        image_BPD = torch.randn(8, 65, 64)
        with torch.profiler.profile(profile_memory=True) as profile:
            found = model.qformer(image_BPD=image_BPD)  # held, and with it what its gradient needs
        assert found.hidden_BSD.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    whole = kept()
    recompute(model, ["qformer"])
    again = kept()
    print(f"\n{whole / 2**20:.1f} MB, computed again {again / 2**20:.1f} MB")
    assert again < 0.4 * whole


@pytest.mark.parametrize(
    ("parts", "problem"),
    [("language", "names 'language'; stage 1 has vision, qformer"), ("vision", "names the image encoder, which is")],
)
def test_what_is_not_computed_again(write_recipe, matching_model, parts, problem):
    with pytest.raises(RecipeError, match=re.escape(f"checkpoint_activations: {problem}")):
        train.run(write_recipe(1, matching_model), overrides={"checkpoint_activations": parts})
