"""Weights in oneDNN's order are ordinary parameters to everybody, and products with them what plain ones are.

The layers here are as large as those that are packed, or the limit is lowered: small layers are plain ones.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from blip2 import checkpoint, linear
from blip2.linear import Linear, Table, Weight
from blip2.model import identity

DTYPES = [torch.float32, torch.bfloat16]
INPUTS, OUTPUTS = 2048, 512  # 2**20 weights


def answer(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(x)


def is_packed(layer: nn.Module) -> bool:
    weight = layer.weight
    return isinstance(weight, Weight) and weight.numbers._packed is not None


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.fixture(params=DTYPES, ids=str)
def pair(request) -> tuple[Linear, nn.Linear, Tensor]:
    """A layer whose weight lies packed, a plain one of the same numbers, and something to multiply them with."""
    if not linear.is_worth_packing(request.param, INPUTS * OUTPUTS):
        pytest.skip(f"this processor multiplies {request.param} no faster in another order")
    torch.manual_seed(0)
    ours, theirs = Linear(INPUTS, OUTPUTS).to(request.param), nn.Linear(INPUTS, OUTPUTS).to(request.param)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, INPUTS).to(request.param)
    close(answer(ours, x), theirs(x))
    assert is_packed(ours)
    return ours, theirs, x


def test_a_parameter_is_there_whole_and_once(pair):
    ours, theirs, _ = pair
    told = [(name, each.shape, each.dtype, each.requires_grad) for name, each in ours.named_parameters()]
    assert told == [(name, each.shape, each.dtype, each.requires_grad) for name, each in theirs.named_parameters()]
    assert isinstance(ours.weight, nn.Parameter)
    assert ours.weight.is_leaf
    assert next(ours.parameters()) is ours.weight
    assert is_packed(ours)  # looking at it costs nothing
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.numbers._plain is None  # the memory is that of one weight


def test_state_goes_out_and_in(pair, tmp_path):
    ours, theirs, x = pair
    state = ours.state_dict()
    assert [type(value) for value in state.values()] == [Tensor, Tensor]
    save_file(state, tmp_path / "state.safetensors")
    for read in (load_file(tmp_path / "state.safetensors"), saved(state)):
        assert all(torch.equal(read[name], value) for name, value in theirs.state_dict().items())
    other = nn.Linear(INPUTS, OUTPUTS).to(x.dtype)
    result = ours.load_state_dict(other.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    close(answer(ours, x), other(x))
    del state["weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        ours.load_state_dict(state)


def test_what_shares_the_memory_is_never_stale(pair):
    """As long as somebody holds it, what they change is what the next answer is computed from."""
    ours, theirs, x = pair
    storage = ours.weight.untyped_storage()
    close(answer(ours, x), theirs(x))
    assert not is_packed(ours)
    del storage
    held = ours.state_dict()["weight"]
    array = ours.weight.detach().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).numpy()
    close(answer(ours, x), theirs(x))
    held.zero_()
    close(answer(ours, x), ours.bias.expand(3, -1))
    array[:] = 0x3F80 if x.dtype == torch.bfloat16 else 0x3F800000  # 1.0
    close(answer(ours, x), x.sum(-1, keepdim=True) + ours.bias)
    del held, array
    answer(ours, x)
    assert is_packed(ours)


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "its data": lambda layer: layer.weight.data.mul_(2),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "a view": lambda layer: layer.weight[:7].zero_(),
    "an index": lambda layer: layer.weight.__setitem__((slice(None), 3), 1.0),
    "copy_": lambda layer: layer.weight.copy_(torch.ones(OUTPUTS, INPUTS)),
    "init": lambda layer: nn.init.constant_(layer.weight, 0.5),
    "all of them": lambda layer: torch._foreach_mul_(list(layer.parameters()), 2.0),
    "one vector": lambda layer: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(layer.parameters()) * 2, layer.parameters()
    ),
    "a state": lambda layer: layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen_by_the_next_answer(pair, name):
    ours, theirs, x = pair
    before = answer(ours, x).clone()
    for layer in (ours, theirs):
        with torch.no_grad():
            CHANGES[name](layer)
    close(answer(ours, x), theirs(x))
    assert not torch.allclose(before, answer(ours, x))
    assert is_packed(ours) or name == "one vector"  # in which it lies beside the bias


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW, fused", "SGD, foreach"])
def test_it_learns_as_a_plain_one(pair, optimizer):
    ours, theirs, x = pair
    name, *flags = optimizer.split(", ")
    for layer in (ours, theirs):
        learner = getattr(torch.optim, name)(layer.parameters(), lr=0.01, **dict.fromkeys(flags, True))
        for _ in range(2):
            learner.zero_grad()
            layer(x).square().mean().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            learner.step()
            answer(layer, x)  # an evaluation between two steps
    close(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.weight, theirs.weight) or (ours.weight - theirs.weight).abs().max() < 1e-4
    close(answer(ours, x), theirs(x))


def test_gradients_go_through_a_frozen_one(pair):
    ours, theirs, x = pair
    gradients = []
    for layer in (ours.requires_grad_(False), theirs.requires_grad_(False)):
        own = x.clone().requires_grad_()
        layer(own).square().mean().backward()
        gradients.append(own.grad)
    close(*gradients)
    assert is_packed(ours)


def test_copies_and_pickles_are_independent(pair):
    ours, theirs, x = pair
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved(ours)]
    with torch.no_grad():
        ours.weight.zero_()
    for twin in twins:
        assert isinstance(twin.weight, Weight)
        assert torch.equal(twin.weight, theirs.weight)
        close(answer(twin, x), theirs(x))
        assert is_packed(twin)


def test_memory_of_several_processes_stays_theirs(pair):
    ours, theirs, x = pair
    ours.share_memory()
    answer(ours, x)
    assert ours.weight.is_shared()
    twin = pickle.loads(ForkingPickler.dumps(ours))  # as another process gets it
    with torch.no_grad():
        twin.weight.mul_(0.5)
        theirs.weight.mul_(0.5)
    close(answer(ours, x), theirs(x))


def test_parameters_are_saved_as_they_are_and_looked_at_in_inference(pair):
    ours, theirs, x = pair
    with torch.inference_mode():
        state = ours.state_dict() | {"data": ours.weight.data, "detached": ours.weight.detach()}
    assert all(torch.equal(state[name], theirs.weight) for name in ("weight", "data", "detached"))
    read = saved(dict(ours.named_parameters()))
    assert torch.equal(read["weight"], theirs.weight)
    ours(x).sum().backward()
    assert ours.weight.grad is not None


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(value, dict))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_cast(pair, dtype):
    ours, theirs, x = pair
    for layer in (ours, theirs):
        layer.to(dtype)
    assert {each.dtype for each in ours.parameters()} == {dtype}
    assert torch.equal(ours.weight, theirs.weight)
    close(answer(ours, x.to(dtype)), theirs(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_its_way(pair, dtype):
    ours, theirs, x = pair
    with torch.autocast("cpu", dtype):
        assert answer(ours, x).dtype == dtype
        assert torch.equal(answer(ours, x), theirs(x))


def test_inputs_of_another_type_are_refused_as_by_a_plain_one(pair):
    ours, _, x = pair
    with pytest.raises(RuntimeError, match=r"same dtype|expected m1 and m2"):
        answer(ours, x.to(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_data_of_another_type_takes_its_place(pair, dtype):
    ours, theirs, x = pair
    learner = torch.optim.SGD(ours.parameters(), lr=0.1)
    for layer in (ours, theirs):
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype) * 2
    assert learner.param_groups[0]["params"][0] is ours.weight
    assert ours.weight.dtype == dtype
    assert ours.state_dict()["weight"].dtype == dtype
    close(answer(ours, x.to(dtype)), theirs(x.to(dtype)))


# --- models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def packs_all(monkeypatch) -> None:
    monkeypatch.setattr(linear, "MIN_PACKED_WEIGHTS", 0)


def test_large_layers_are_packed_and_small_ones_are_not(any_model, monkeypatch):
    def linears(model: nn.Module) -> list[tuple[bool, int]]:
        return [(is_packed(each), each.weight.numel()) for each in model.modules() if isinstance(each, Linear)]

    sizes = {size for _, size in linears(checkpoint.load(any_model))}
    assert len(sizes) > 1
    monkeypatch.setattr(linear, "MIN_PACKED_WEIGHTS", max(sizes))
    packed = linears(checkpoint.load(any_model, dtype=torch.float32))
    assert all(is_packed == (size == max(sizes)) for is_packed, size in packed)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_a_module_like_any_other(any_model, packs_all, dtype, quantize, tmp_path):
    model = checkpoint.load(any_model, dtype=dtype, quantize=quantize)
    state = model.state_dict()
    assert {name for name, _ in model.named_parameters()} <= set(state)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)]
    other = checkpoint.load(any_model, dtype=dtype, quantize=quantize)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert identity(other) != identity(model)
    other.load_state_dict(state)
    for twin in (*twins, other):
        assert identity(twin) == identity(model)
        assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items())
        checkpoint.save(twin, tmp_path / "again")
        again = checkpoint.load(tmp_path / "again", dtype=dtype).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again.items())
    del state
    pixels = torch.randn(2, 3, 28, 28)
    expected = answer(lambda x: model.encode(x), pixels)
    for twin in (*twins, other):
        assert torch.equal(answer(lambda x, twin=twin: twin.encode(x), pixels), expected)


def test_an_opts_table_is_not_in_memory_twice_in_float32(opt_model, packs_all):
    language = checkpoint.load(opt_model, dtype=torch.float32).language
    assert is_packed(language.blocks[0].fc1)
    assert type(language.token_embedding.weight) is nn.Parameter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_table_is_the_head_too(rows, dtype):
    table = Table(linear.MIN_PACKED_WEIGHTS // 64, 64).to(dtype)
    hidden_RD = torch.randn(rows, 64).to(dtype)
    expected = F.linear(hidden_RD, table.weight.detach().clone())
    close(answer(table.scores, hidden_RD), expected)
    assert torch.equal(answer(table, torch.arange(5)), table.weight[:5])
    with torch.no_grad():
        table.weight[3] = 0
    assert not answer(table.scores, hidden_RD)[:, 3].any()
    assert not answer(table, torch.tensor([3])).any()


def test_gradients_reach_what_a_table_is_multiplied_by():
    table = Table(linear.MIN_PACKED_WEIGHTS // 64, 64).requires_grad_(False)
    ours, plain = (torch.ones(2, 64, requires_grad=True) for _ in range(2))
    table.scores(ours).square().sum().backward()
    F.linear(plain, table.weight).square().sum().backward()
    assert torch.equal(ours.grad, plain.grad)


def test_a_numpy_array_of_a_weight_is_its_memory():
    layer = Linear(INPUTS, OUTPUTS)
    answer(layer, torch.randn(1, INPUTS))
    array = layer.weight.detach().numpy()
    assert isinstance(array, np.ndarray)
    array[:] = 2
    assert torch.equal(layer.weight, torch.full((OUTPUTS, INPUTS), 2.0))


def test_parametrized_pruned_and_offloaded():
    """What others do with layers: the weight computed from another, masked, or put elsewhere by its type."""
    for change in (
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: setattr(layer, "weight", type(layer.weight)(layer.weight.double(), requires_grad=False)),
        lambda layer: setattr(layer, "weight", type(layer.weight)(layer.weight.to("meta"), requires_grad=False)),
    ):
        ours, theirs = Linear(INPUTS, OUTPUTS), nn.Linear(INPUTS, OUTPUTS)
        theirs.load_state_dict(ours.state_dict())
        for layer in (ours, theirs):
            change(layer)
            layer.double()
        x = torch.randn(2, INPUTS, dtype=torch.float64, device=ours.weight.device)
        if x.device.type == "cpu":
            close(answer(ours, x), theirs(x).detach())
            assert set(ours.state_dict()) == set(theirs.state_dict())
        else:
            assert ours.weight.is_meta
