"""Linear layers with weights of 8 and 4 bits: right within what the bits allow, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2 import native
from blip2.errors import NotFiniteError
from blip2.quantized import TILE, QuantizedLinear, pack, round_to_codes, unpack

T = TypeVar("T")
WEIGHT_ERROR = {8: 0.012, 4: 0.11}  # relative, of normally distributed weights
HAS_KERNELS = native.kernels() is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the C kernels are not compiled here")


def quantized(weight_ND: torch.Tensor, bits: int, *, group_size: int = 64, bias: bool = False) -> QuantizedLinear:
    num_outputs, num_inputs = weight_ND.shape
    layer = QuantizedLinear(num_inputs, num_outputs, bits=bits, group_size=group_size, has_bias=bias)
    if layer.bias is not None:
        layer.bias.data = torch.randn(num_outputs)
    layer.fill(weight_ND, torch.device("cpu"))
    return layer


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


BEST = len(native.LEVELS) - 1


@pytest.fixture(params=[*native.LEVELS, "torch"])
def way(request, monkeypatch):
    """The ways in which a product is computed: the kernels for each kind of processor, and torch."""
    library = native.kernels()
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
        yield request.param
        return
    if library is None:
        pytest.skip("the C kernels are not compiled here")
    level = native.LEVELS.index(request.param)
    if library.blip2_prepare(level) < level:
        pytest.skip(f"this processor is without {request.param}")
    yield request.param
    library.blip2_prepare(BEST)


def on_each_level(work: Callable[[], T]) -> list[T]:
    """What the kernels for any processor make of it, and those for each kind that this one is."""
    library = native.kernels()
    assert library is not None
    try:
        return [work() for level in range(BEST + 1) if library.blip2_prepare(level) == level]
    finally:
        library.blip2_prepare(BEST)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(192, 192), (70, 100), (32, 64), (3, 7), (65, 129), (1, 1)])
def test_a_product_is_that_of_the_rounded_weights(way, bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    layer = quantized(torch.randn(shape), bits, bias=True)
    x = torch.randn(2, 5, shape[1])
    expected = F.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).double(), expected, atol=2e-3, rtol=1e-3)
        assert relative_error(layer(x.bfloat16()), expected) < 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_the_rounding(way, bits: int) -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 512)
    assert relative_error(quantized(weight, bits).dequantized(), weight) < WEIGHT_ERROR[bits]
    ways = [quantized(weight.to(dtype), bits) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for layer in ways:
        assert relative_error(layer.dequantized(), weight) < WEIGHT_ERROR[bits]


@needs_kernels
@given(
    bits=st.sampled_from([8, 4]), group_size=st.sampled_from([32, 64, 128]), num_inputs=st.integers(1, 200),
    num_outputs=st.integers(1, 80), rows=st.integers(1, 9), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1, 1e6]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_kernels_equal_those_for_any_processor_and_torch(
    bits: int, group_size: int, num_inputs: int, num_outputs: int, rows: int, seed: int, scale: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(num_outputs, num_inputs, generator=generator) * scale).to(dtype)
    layers = on_each_level(lambda: quantized(weight, bits, group_size=group_size))
    layer = layers[0]
    assert all(torch.equal(other.codes, layer.codes) for other in layers)
    assert all(torch.equal(other.scales, layer.scales) for other in layers)
    x = torch.randn(rows, num_inputs, generator=generator).to(dtype)
    with torch.inference_mode():
        ours, *others = on_each_level(lambda: layer(x))
    assert all(torch.equal(ours, other) for other in others)  # sums of integers: to the last bit
    theirs = F.linear(x.float(), layer.dequantized())
    precision = 1e-3 if dtype == torch.float32 else 2**-8
    # A row keeps 15 bits of its largest number; in a sum that cancels, that is all that its result is known to.
    atol = float(x.abs().max() / 127 / 254 * layer.dequantized().abs().sum(-1).max()) + 1e-30
    torch.testing.assert_close(ours.float(), theirs, rtol=precision, atol=atol)


def by_torch(weight_ND: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = QuantizedLinear(*reversed(weight_ND.shape), bits=bits, group_size=group_size, has_bias=False)
    codes_ND, scales_NG = round_to_codes(layer._padded(weight_ND.float()), bits, layer.group_size)
    return pack(codes_ND, bits), scales_NG.unflatten(0, (-1, TILE)).transpose(1, 2)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)  # tiny, subnormal, huge ones; zeros of either sign


@needs_kernels
@given(
    bits=st.sampled_from([8, 4]), group_size=st.sampled_from([32, 64, 128]), dtype=st.sampled_from([*native.TYPES]),
    row=st.lists(FLOATS, min_size=1, max_size=200), magnitude=st.integers(-149, 127), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_both_quantisers_agree_on_every_finite_weight(
    bits: int, group_size: int, dtype: torch.dtype, row: list[float], magnitude: int, seed: int
) -> None:
    noise = torch.randn(3, len(row), generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    weight = torch.cat([torch.tensor([row]), -torch.tensor([row]), noise]).to(dtype)
    weight = weight.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    codes, scales = by_torch(weight, bits, group_size)
    assert scales.isfinite().all()
    for layer in on_each_level(lambda: quantized(weight, bits, group_size=group_size)):
        assert torch.equal(layer.codes, codes)
        assert torch.equal(layer.scales.view(torch.int16), scales.contiguous().view(torch.int16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e30, 1e37])
def test_weights_of_any_magnitude_are_rounded_as_well(way, bits: int, magnitude: float) -> None:
    """Where a bfloat16 is a multiple of the smallest one, scales are coarse, but no code flies to the other end."""
    torch.manual_seed(6)
    weight = torch.randn(32, 128) * magnitude
    layer = quantized(weight, bits)
    error = (layer.dequantized() - weight).abs()
    assert (error <= torch.finfo(torch.bfloat16).smallest_normal * 2**-7 * 127 + 0.2 * weight.abs().max()).all()
    if magnitude > 1e-37:
        assert relative_error(layer.dequantized(), weight) < WEIGHT_ERROR[bits]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [(0, 0), (32, 69)])
def test_a_weight_that_is_no_number_has_no_code(
    way, bits: int, value: float, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    weight = torch.randn(33, 70)
    weight[place] = value
    with pytest.raises(NotFiniteError, match="a weight is NaN or infinite and cannot be quantised"):
        quantized(weight.to(dtype), bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_of_any_magnitude(way, bits: int) -> None:
    layer = quantized(torch.randn(32, 128), bits)
    for magnitude in (1e-45, 1e-39, 1e-37, 1e-30, 1e30):
        x = torch.randn(2, 128) * magnitude
        with torch.inference_mode():
            expected = F.linear(x.double(), layer.dequantized().double()).float()
            torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=max(2e-3 * magnitude, 1e-34))


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_largest_codes_and_activations_do_not_overflow(bits: int, rows: int) -> None:
    """Sums of pairs in 16 bits are what some processors have: all as large as it gets, of either sign."""
    layer = quantized(torch.zeros(32, 10_240), bits)
    layer.scales.fill_(1)
    for code in (0, 255):
        layer.codes.fill_(code)
        for sign in (1, -1):
            x = torch.full((rows, 10_240), 127.0 * sign)
            x[:, ::2] -= 0.49 * sign  # what is left over is of almost full size as well
            with torch.inference_mode():
                ours, *others = on_each_level(lambda x=x: layer(x))
            assert all(torch.equal(ours, other) for other in others)
            torch.testing.assert_close(ours, F.linear(x, layer.dequantized()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@needs_kernels
def test_a_row_does_not_depend_on_its_company(bits: int) -> None:
    torch.manual_seed(3)
    layer = quantized(torch.randn(96, 160), bits)
    x = torch.randn(23, 160)
    x[4] *= 1e4
    with torch.inference_mode():
        together = layer(x)
        assert all(torch.equal(layer(row[None])[0], expected) for row, expected in zip(x, together, strict=True))


def naive_per_tensor(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One scale for all activations, one for all weights: what outliers ruin."""
    steps = x.abs().max() / 127, weight.abs().max() / 127
    return F.linear((x / steps[0]).round() * steps[0], (weight / steps[1]).round() * steps[1])


def test_outlier_channels_do_no_harm(way) -> None:
    """As in OPT-6.7b: six of 4,096 channels are sixty times as large as the others, on every token."""
    torch.manual_seed(4)
    weight = torch.randn(256, 4096) * 0.02
    x = torch.randn(16, 4096)
    outliers = torch.randperm(4096)[:6]
    x[:, outliers] *= 60
    exact = F.linear(x.double(), weight.double())
    with torch.inference_mode():
        ours = quantized(weight, 8)(x)
    assert relative_error(ours, exact) < 0.01
    assert relative_error(naive_per_tensor(x, weight), exact) > 0.1
    # And what the other channels carry, taken by itself: naive rounding loses it altogether.
    weight[:, outliers] = 0
    exact = F.linear(x.double(), weight.double())
    with torch.inference_mode():
        assert relative_error(quantized(weight, 8)(x), exact) < 0.01
    assert relative_error(naive_per_tensor(x, weight), exact) > 0.3


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_reach_what_comes_in(bits: int) -> None:
    torch.manual_seed(5)
    layer = quantized(torch.randn(40, 64), bits)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * F.linear(x, layer.dequantized()) @ layer.dequantized()
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weights_in_full_precision_wait_for_the_way_back(bits: int) -> None:
    """Those of a whole language model would be as large as it was before it was quantised."""
    kept = []
    layer, x = quantized(torch.randn(40, 64), bits), torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        layer(x).sum().backward()
    assert all(number < 40 * 64 for number in kept)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_so(way, bits: int, value: float) -> None:
    layer = quantized(torch.randn(33, 70), bits)
    x = torch.randn(3, 70)
    x[1, 69] = value
    with torch.inference_mode():
        is_finite = layer(x).isfinite()
    assert is_finite[0].all() and is_finite[2].all() and not is_finite[1].all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros(way, bits: int) -> None:
    layer = quantized(torch.zeros(33, 70), bits)
    with torch.inference_mode():
        assert torch.equal(layer(torch.randn(2, 70)), torch.zeros(2, 33))
        assert torch.equal(quantized(torch.randn(33, 70), bits)(torch.zeros(2, 70)), torch.zeros(2, 33))


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_undone_by_unpacking(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 128), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 2).int(), codes.int() - 2 ** (bits - 1))
