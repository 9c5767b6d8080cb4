"""Products of 8 bits by 8 bits, for the many rows of an image encoder: what they are, whatever computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import blip2
from blip2 import native
from blip2.config import VisionConfig
from blip2.finite import is_finite
from blip2.native.build import SOURCE
from blip2.quantized import EXACT_INPUTS, QuantizedLinear, round_activations
from blip2.vision import VisionTransformer

BAND, PANEL = 13, 13 * 32  # rows that meet weights together, and that go past all weights together: see kernels.c
CPU = torch.device("cpu")


def has_kernel() -> bool:
    library = native.kernels()
    return library is not None and library.blip2_prepare(2) == 2


needs_kernel = pytest.mark.skipif(not has_kernel(), reason="this processor has no byte dot products, or no kernels")


@pytest.fixture(params=["kernel", "torch", "kernels for another processor"])
def way(request, monkeypatch):
    library = native.kernels()
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif request.param == "kernel" and not has_kernel():
        pytest.skip("this processor has no byte dot products, or the kernels are not compiled")
    elif library is None:
        pytest.skip("the C kernels are not compiled here")
    elif request.param != "kernel":
        library.blip2_prepare(1)
    yield request.param
    if library is not None:
        library.blip2_prepare(2)


def quantized(weight_ND: Tensor, bias_N: Tensor | None = None) -> QuantizedLinear:
    num_outputs, num_inputs = weight_ND.shape
    layer = QuantizedLinear(
        num_inputs, num_outputs, bits=8, group_size=64, has_bias=bias_N is not None, activation_bits=8
    )
    if layer.bias is not None:
        layer.bias.data = bias_N
    layer.fill(weight_ND, CPU)
    return layer


def by_torch(layer: QuantizedLinear, x: Tensor, *, has_gelu: bool = False) -> Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(native, "kernels", lambda: None)
        return layer(x, has_gelu=has_gelu)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def test_the_rows_of_these_tests_are_on_both_sides_of_what_the_kernel_has() -> None:
    text = SOURCE.read_text("utf-8")
    assert f"#define BAND {BAND} " in text and f"#define BANDS {PANEL // BAND} " in text


# Widths around fours (what a product takes at a time), and around what float32 sums exactly; channels around tiles.
WIDTHS = [1, 3, 4, 5, 63, 64, 65, EXACT_INPUTS, EXACT_INPUTS + 1, 2 * EXACT_INPUTS + 1]
CHANNELS = [1, 15, 16, 17, 31, 32, 33, 64, 65]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_is_that_of_the_rounded_numbers(way: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    layer = quantized(torch.randn(33, width), torch.randn(33))
    x = torch.randn(2, 7, width).to(dtype)
    codes, steps = round_activations(x)
    expected = F.linear(codes.double() * steps.double(), layer.dequantized().double(), layer.bias.double())
    with torch.inference_mode():
        ours = layer(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours.double(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=2e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("channels", CHANNELS)
def test_any_number_of_channels(way: str, channels: int) -> None:
    torch.manual_seed(channels)
    weight, x = torch.randn(channels, 70), torch.randn(20, 70)
    with torch.inference_mode():
        assert relative_error(quantized(weight)(x), x.double() @ weight.double().T) < 0.02


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, BAND - 1, BAND, BAND + 1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 1])
def test_any_number_of_rows(rows: int, threads: int) -> None:
    torch.manual_seed(rows)
    layer = quantized(torch.randn(65, 66), torch.randn(65))
    x = torch.randn(rows, 66)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            ours = layer(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours, by_torch(layer, x))


@needs_kernel
@given(
    width=st.integers(1, 300), channels=st.integers(1, 80), rows=st.integers(1, 40), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1, 1e6]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_kernel_and_torch_agree_to_the_last_bit(
    width: int, channels: int, rows: int, seed: int, scale: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = quantized(
        torch.randn(channels, width, generator=generator) * scale, torch.randn(channels, generator=generator)
    )
    x = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    with torch.inference_mode():
        assert torch.equal(layer(x), by_torch(layer, x))


def test_a_row_does_not_depend_on_its_company(way: str) -> None:
    torch.manual_seed(3)
    layer = quantized(torch.randn(96, 2 * EXACT_INPUTS + 9))
    x = torch.randn(30, 2 * EXACT_INPUTS + 9)
    x[4] *= 1e4
    x[5] = float("nan")
    with torch.inference_mode():
        together = layer(x, has_gelu=True)
        for row, expected in zip(x, together, strict=True):
            torch.testing.assert_close(layer(row[None], has_gelu=True)[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("code", [0, 1, 255])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_activations_do_not_overflow(way: str, code: int, sign: int) -> None:
    width = 2**17  # the widest feed-forward layer that a config.json may ask for
    layer = quantized(torch.zeros(1, width))
    layer.scales.fill_(1)
    layer.codes.fill_(code)
    with torch.inference_mode():
        ours = layer(torch.full((1, width), 127.0 * sign))
    assert ours.item() == (code - 128) * 127 * sign * width


def test_the_gelu(way: str) -> None:
    at = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, 1e30, -5.5, 5.5, 0.0])])
    layer = quantized(torch.zeros(len(at), 4), at)
    with torch.inference_mode():
        ours = layer(torch.zeros(1, 4), has_gelu=True)[0].double()
    expected = F.gelu(at.double())
    assert ((ours - expected).abs() <= 4e-7 * at.double().abs()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 69])
def test_what_is_not_a_number_stays_so(way: str, value: float, place: int) -> None:
    layer = quantized(torch.randn(33, 70), torch.randn(33))
    x = torch.randn(15, 70)
    x[1, place] = value
    with torch.inference_mode():
        found = layer(x)
    assert found[1].isnan().all()
    assert found[[0, *range(2, 15)]].isfinite().all()


def test_activations_of_any_magnitude(way: str) -> None:
    weight = torch.randn(32, 128)
    layer = quantized(weight)
    for magnitude in (0, 1e-45, 1e-39, 1e-37, 1e-30, 1e30):
        x = torch.randn(2, 128) * magnitude
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), F.linear(x, weight), rtol=0, atol=max(0.5 * magnitude, 1e-34))


@pytest.mark.parametrize(("times", "most"), [(1, 0.015), (10, 0.04), (60, 0.11)])
def test_what_outlier_channels_cost(times: int, most: float) -> None:
    """Six of 4,096 channels so many times as large as the others, on every row: unlike activations of 15 bits, those
    of 8 lose by it. See docs/benchmarks.md."""
    torch.manual_seed(4)
    weight, x = torch.randn(256, 4096) * 0.02, torch.randn(16, 4096)
    x[:, torch.randperm(4096)[:6]] *= times
    with torch.inference_mode():
        assert most / 2 < relative_error(quantized(weight)(x), F.linear(x.double(), weight.double())) < most


def test_gradients_reach_what_comes_in() -> None:
    layer = quantized(torch.randn(40, 64))
    x = torch.randn(3, 64, requires_grad=True)
    layer(x, has_gelu=True).sum().backward()
    other = x.detach().clone().requires_grad_()
    F.gelu(F.linear(other, layer.dequantized())).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


# ---- an image encoder ----


def encoder(width: int, activation: str = "gelu") -> VisionTransformer:
    torch.manual_seed(5)
    return VisionTransformer(
        VisionConfig(
            hidden_size=width, num_layers=4, num_heads=2, intermediate_size=3 * width + 2, image_size=32, patch_size=8,
            activation=activation,
        )
    ).eval()  # fmt: skip


def in_8_bits(model: VisionTransformer) -> VisionTransformer:
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, torch.nn.Linear):
            model.set_submodule(name, quantized(module.weight.detach(), module.bias.detach()))
    return model


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("width", [48, 54])
def test_an_encoder_sees_nearly_the_same_and_each_picture_by_itself(way: str, width: int, activation: str) -> None:
    model, pixels = encoder(width, activation), torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        exact = model(pixels)
        found = in_8_bits(model)(pixels)
        assert 0 < relative_error(found, exact) < 0.03
        assert all(torch.equal(model(one[None])[0], seen) for one, seen in zip(pixels, found, strict=True))
    assert is_finite(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_miniature_sees_nearly_the_same_and_each_picture_by_itself(pictures: list[str], dtype: str) -> None:
    exact, ours = blip2.load(), blip2.load(vision="int8", dtype=dtype)
    model = ours.speaker.model
    pixels = torch.stack([ours.frontend.pixels(picture) for picture in pictures])
    with torch.inference_mode():
        together = model.vision(pixels)
        alone = torch.cat([model.vision(one[None]) for one in pixels])
        error = relative_error(model.look(together), exact.speaker.model.encode(pixels))
    assert 0 < error < 0.02
    if dtype == "float32":
        assert torch.equal(together, alone)
