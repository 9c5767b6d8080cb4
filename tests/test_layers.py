"""Products in oneDNN's own order say what plain ones say, and cost memory only where they replace something."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blip2 import checkpoint
from blip2.layers import PackedLinear, multiply_by_table


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_large_table_as_head(rows):
    table_VD = torch.randn(PackedLinear.WORTH_IT // 64, 64)
    hidden_RD = torch.randn(rows, 64)
    with torch.inference_mode():
        assert torch.allclose(multiply_by_table(hidden_RD, table_VD), hidden_RD @ table_VD.T, atol=1e-4)


def test_gradients_reach_what_a_table_is_multiplied_by():
    table_VD = torch.randn(PackedLinear.WORTH_IT // 64, 64)
    ours, plain = (torch.ones(2, 64, requires_grad=True) for _ in range(2))
    multiply_by_table(ours, table_VD).square().sum().backward()
    F.linear(plain, table_VD).square().sum().backward()
    assert torch.equal(ours.grad, plain.grad)


def test_large_layers_are_packed_and_small_ones_are_not(any_model, monkeypatch):
    def linears(model: nn.Module) -> list[tuple[str, bool, int]]:
        kinds = (PackedLinear, nn.Linear)
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
        return [(name, isinstance(layer, PackedLinear), layer.weight.numel()) for name, layer in found]

    sizes = {size for _, _, size in linears(checkpoint.load(any_model))}
    assert len(sizes) > 1
    monkeypatch.setattr(PackedLinear, "WORTH_IT", max(sizes))
    packed = checkpoint.load(any_model, dtype=torch.float32, pack=True)
    assert all(is_packed == (size == max(sizes)) for _, is_packed, size in linears(packed))
    assert any(is_packed for _, is_packed, _ in linears(packed))


def test_an_opts_table_is_not_in_memory_twice(opt_model, monkeypatch):
    monkeypatch.setattr(PackedLinear, "WORTH_IT", 0)
    language = checkpoint.load(opt_model, dtype=torch.float32, pack=True).language
    assert isinstance(language.blocks[0].fc1, PackedLinear)
    assert language.output is None
