"""The arithmetic of a step, by the sizes of the model, beside what torch counts while it is computed."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip2 import checkpoint
from blip2.train import flops
from blip2.train.check import gather
from blip2.train.group import Step
from blip2.train.prepare import prepare
from blip2.train.recipes import load_recipe


def counted(path, overrides):
    """What torch counts in a step, and what is reckoned."""
    recipe = load_recipe(path, overrides | {"optim.batch_size": 8})
    model = checkpoint.load(gather(recipe, path).start)
    for module in model.modules():
        module.dropout = 0.0
    task = prepare(model, gather(recipe, path), recipe, lambda progress: None)
    task.open_features()
    task.learning.train()
    batch = task.make_batch(0, range(8))
    with FlopCounterMode(display=False) as counter:
        task.backward([batch], Step(0, 8, nullcontext, torch.Generator()))
    return counter.get_total_flops(), task.flops(batch)


@pytest.mark.parametrize("features", [True, False])
def test_stage_1(write_recipe, matching_model, features):
    path = write_recipe(1, matching_model)
    if not features:
        path.write_text(path.read_text().replace('features = "features"', ""))
    found, reckoned = counted(path, {})
    assert reckoned == pytest.approx(found, rel=0.03)


def test_stage_2(write_recipe, any_model):
    """Of a T5 the first layer of the decoder needs no gradient, which of two layers is something."""
    found, reckoned = counted(write_recipe(2, any_model), {"data.texts_per_image": 2})
    assert reckoned == pytest.approx(found, rel=0.05)


def test_the_peak_of_a_processor_is_measured():
    found, how = flops.peak(torch.device("cpu"), torch.float32)
    assert 1e8 < found < 1e15 and "products of 1024 x 1024 matrices in torch.float32" in how
    assert flops.peak_memory_mb(torch.device("cpu")) > 10


def test_a_known_gpu_is_looked_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    found = flops.peak(torch.device("cuda"), torch.bfloat16)
    assert found == (756e12, "the manufacturer's figure of the NVIDIA H100 PCIe for bfloat16")
