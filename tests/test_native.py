"""The C kernels against torch: the same results within rounding, on each kind of processor that this one is."""

from __future__ import annotations

import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2 import native
from blip2.language.t5 import RMSNorm
from blip2.layers import attend
from blip2.native import build

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the C kernels are not compiled here")


@pytest.fixture(params=native.LEVELS)
def level(request):
    """The kernels for each kind of processor."""
    library = native.kernels()
    number = native.LEVELS.index(request.param)
    if library.blip2_prepare(number) < number:
        pytest.skip(f"this processor is without {request.param}")
    yield request.param
    library.blip2_prepare(len(native.LEVELS) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "bool per head", "added", "added per row"])
def test_attention_of_single_tokens(level: str, dtype: torch.dtype, mask_kind: str) -> None:
    torch.manual_seed(0)
    rows, heads, length, size = 3, 4, 9, 6
    query = torch.randn(rows, 1, heads, size, dtype=dtype).transpose(1, 2)  # strided, as heads come from a product
    keys, values = torch.randn(2, rows, heads, length + 5, size, dtype=dtype)[:, :, :, :length]
    mask = {
        "none": None,
        "bool": torch.rand(rows, 1, 1, length) > 0.3,
        "bool per head": torch.rand(1, heads, 1, length) > 0.3,
        "added": torch.randn(1, heads, 1, length, dtype=dtype),
        "added per row": torch.randn(rows, heads, 1, length, dtype=dtype),
    }[mask_kind]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    ours = native.attend(query, keys, values, mask, 0.7)
    exact = [t.double() for t in (query, keys, values)]
    added = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    theirs = F.scaled_dot_product_attention(*exact, attn_mask=added, scale=0.7).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def test_a_slot_of_minus_infinity_is_not_looked_at(level: str) -> None:
    query, keys, values = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    bias = torch.zeros(1, 1, 1, 5)
    bias[..., 3:] = float("-inf")
    values[:, :, 3:] = 1e30
    ours = native.attend(query, keys, values, bias, 1.0)
    torch.testing.assert_close(ours, native.attend(query, keys[:, :, :3], values[:, :, :3], None, 1.0))


def test_a_mask_whose_gradient_is_wanted_gets_it() -> None:
    """By the kernel it would get none: maps of where a single query looks would be empty."""
    query, key, value = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    bias = torch.zeros(1, 2, 1, 5, requires_grad=True)
    [gradient] = torch.autograd.grad(attend(query, key, value, mask=bias).sum(), bias)
    assert gradient.abs().max() > 0


def test_attend_is_the_same_for_one_token_as_among_several() -> None:
    query, keys, values = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    with torch.inference_mode():
        several = attend(query, keys, values, is_causal=True)
        one = attend(query[:, :, 3:], keys, values)
    torch.testing.assert_close(one, several[:, 3:], atol=1e-6, rtol=0)


@given(rows=st.integers(1, 5), width=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_rms_norm(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, 1e-6)
    norm.weight.data = torch.randn(width, generator=generator)
    x = torch.randn(rows, width, generator=generator) * 10
    with torch.no_grad():
        ours = norm(x)
    theirs = norm(x.requires_grad_())  # gradients are not for the kernels
    assert theirs.requires_grad and not ours.requires_grad
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


def test_rms_norm_in_bfloat16_rounds_where_torch_does() -> None:
    norm = RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data = torch.randn(64).bfloat16()
    x = torch.randn(50, 64).bfloat16()
    with torch.no_grad():
        ours = norm(x)
    theirs = norm(x.clone().requires_grad_()).detach()
    assert (ours == theirs).float().mean() > 0.99  # a sum in another order may round the other way
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2**-7)


@pytest.mark.parametrize("length", [1, 31, 32, 256, 300])
def test_the_greatest_product_of_several_halves(length: int) -> None:
    vectors_NRL, query_L = torch.randn(50, 3, length).half(), torch.randn(length)
    ours = native.greatest(vectors_NRL, query_L)
    if ours is None:
        pytest.skip("this processor is without half precision")
    torch.testing.assert_close(ours.double(), (vectors_NRL.double() @ query_L.double()).amax(dim=1), atol=1e-4, rtol=0)
    vectors_NRL[7, 1, 0] = float("nan")  # damage is not passed over
    assert native.greatest(vectors_NRL, query_L).isnan().nonzero().tolist() == [[7]]
    assert native.greatest(vectors_NRL[:, ::2], query_L) is None or vectors_NRL[:, ::2].is_contiguous()


@pytest.mark.parametrize("width", [1, 15, 63, 64, 79, 128, 131, 1000, 16384])
def test_checksums_are_those_of_zlib(width: int) -> None:
    content = torch.randint(0, 256, (7, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    if (found := native.checksums(content)) is None:
        pytest.skip("this processor is without the instructions")
    assert found.tolist() == [zlib.crc32(row.numpy().tobytes()) for row in content]


def test_a_library_of_another_source_is_not_used(tmp_path, monkeypatch) -> None:
    """As after an update of the package that did not compile."""
    assert not native.is_stale(native.kernels())
    changed = tmp_path / "kernels.c"
    changed.write_bytes(build.SOURCE.read_bytes() + b"/* changed */")
    monkeypatch.setattr(build, "SOURCE", changed)
    with pytest.warns(UserWarning, match=r"compile it again: python .*build\.py"):
        assert native.kernels.__wrapped__() is None


def test_a_mac_whose_torch_has_no_openmp_does_without(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(native.sys, "platform", "darwin")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert native.kernels.__wrapped__() is None
