"""A linear layer with weights of 8 or 4 bits.

8 bits: a scale for each output channel. 4 bits: a scale for each group of 64 inputs of a channel. Activations keep 15
bits (two int8 planes a row, see ``kernels.c``), so that outlier channels do no harm, and the result of a row depends
only on that row. The C kernels are limited only by memory bandwidth; without them, and on a GPU, torch computes it.

An image encoder, which has many rows, may use activations of 8 bits, with a scale for each row: half the arithmetic.

N output channels (padded to tiles of 32), D inputs (padded to whole groups), G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blip2 import native
from blip2.errors import NotFiniteError
from blip2.finite import is_finite

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
TILE = 32
LANES = 8
LEAST = 4e-37  # as in kernels.c: rows with smaller values count as zeros
EXACT_INPUTS = 2**24 // (128 * 127)
"""Up to this many inputs, sums of products of 8 by 8 bits are exact in float32, in any order."""


class QuantizedLinear(nn.Module):
    """Replaces an ``nn.Linear`` with ``in_features`` and ``out_features``.

    ``codes`` uint8[bytes] and ``scales`` bfloat16[N / 32, G, 32] have the layout of ``kernels.c``, in memory and in
    checkpoints. ``group_size`` (4 bits only) is one of 32, 64, 128. ``activation_bits``: 15, or 8 (with 8 bits only).
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        has_bias: bool,
        activation_bits: int = 15,
    ) -> None:
        super().__init__()
        assert bits in BITS and (bits == 8 or group_size in GROUP_SIZES), (bits, group_size)
        assert activation_bits == 15 or (activation_bits == bits == 8), (bits, activation_bits)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.activation_bits = activation_bits
        num_tiles = -(-out_features // TILE)
        # With 8 bits the whole row is one group; the kernels read inputs in fours.
        self.group_size = -(-in_features // 4) * 4 if bits == 8 else group_size
        num_groups = -(-in_features // self.group_size)
        num_bytes = num_tiles * TILE * num_groups * self.group_size * bits // 8
        self.register_buffer("codes", torch.empty(num_bytes, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(num_tiles, num_groups, TILE, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if has_bias else None

    @torch.no_grad()
    def fill(self, weight_ND: Tensor, device: torch.device) -> None:
        """Quantise the weights ``float[N, D]``, rounded to the nearest codes, and move them to a device.

        Raises NotFiniteError if one is NaN or infinite.
        """
        assert weight_ND.shape == (self.out_features, self.in_features)
        codes = torch.empty_like(self.codes, device="cpu")
        scales = torch.empty_like(self.scales, device="cpu")
        weight_ND = weight_ND.cpu() if weight_ND.dtype in native.TYPES else weight_ND.cpu().float()
        if native.can_take(weight_ND):
            is_sound = native.quantize(weight_ND, self.bits, self.group_size, codes, scales)
        elif is_sound := is_finite(weight_ND):
            codes_ND, scales_NG = round_to_codes(self._padded(weight_ND.float()), self.bits, self.group_size)
            codes.copy_(pack(codes_ND, self.bits))
            scales.copy_(scales_NG.unflatten(0, (-1, TILE)).transpose(1, 2))
        if not is_sound:
            raise NotFiniteError("a weight is NaN or infinite and cannot be quantised")
        self.codes, self.scales = codes.to(device), scales.to(device)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weights: ``float[N, D]``."""
        codes_ND, scales_NG = self._rows()
        weight_ND = codes_ND.unflatten(1, (-1, self.group_size)).to(dtype) * scales_NG[..., None].to(dtype)
        return weight_ND.flatten(1)[: self.out_features, : self.in_features]

    def forward(self, x: Tensor, *, has_gelu: bool = False) -> Tensor:
        """``float[..., D]`` to ``float[..., N]``, optionally followed by a GELU. Gradients reach x, not the weights."""
        if self.activation_bits == 8 and not (torch.is_grad_enabled() and x.requires_grad):
            return self._rounding_activations(x, has_gelu)
        if native.can_take(x) and self.is_unmodified():
            out = native.linear(
                x, self.codes, self.scales, self.bias,
                bits=self.bits, group_size=self.group_size, channels=self.out_features,
            )  # fmt: skip
        elif torch.is_grad_enabled() and x.requires_grad and not (self.bias is not None and self.bias.requires_grad):
            out = _Product.apply(x, self)
        else:
            out = F.linear(x, self.dequantized(x.dtype), self._bias(x.dtype))
        return F.gelu(out) if has_gelu else out

    def _rounding_activations(self, x: Tensor, has_gelu: bool) -> Tensor:
        """As `forward`, with activations of 8 bits: exact integer sums, by a kernel or in float32."""
        if native.can_take(x) and self.is_unmodified():
            out = native.linear_of_many(
                x, self.codes, self.scales, self.bias,
                padded=self.group_size, channels=self.out_features, has_gelu=has_gelu,
            )  # fmt: skip
            if out is not None:
                return out
        with torch.autocast(x.device.type, enabled=False):
            codes_ND, scales_N1 = self._rows()
            codes_ND = codes_ND[: self.out_features, : self.in_features].float()
            x_codes, x_steps = round_activations(x)
            some = zip(x_codes.split(EXACT_INPUTS, -1), codes_ND.split(EXACT_INPUTS, -1), strict=True)
            sums = torch.stack([F.linear(x_few, few).double() for x_few, few in some]).sum(0)
            out = sums.float() * scales_N1[: self.out_features, 0].float() * x_steps
            if self.bias is not None:
                out = out + self.bias.float()
            return (F.gelu(out) if has_gelu else out).to(x.dtype)

    def is_unmodified(self) -> bool:
        """Whether codes, scales and bias can be read by the kernels: on the CPU, with their original dtypes."""
        scales, bias = self.scales, self.bias
        if bias is not None and (bias.dtype != torch.float32 or (bias.requires_grad and torch.is_grad_enabled())):
            return False
        return self.codes.device.type == scales.device.type == "cpu" and scales.dtype == torch.bfloat16

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`nn.Module.to`: moves the layer, but keeps the dtypes of scales and bias."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.bits == 4 else ""
        group += ", activation_bits=8" if self.activation_bits == 8 else ""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{group}, bias={self.bias is not None}"

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _padded(self, weight_ND: Tensor) -> Tensor:
        num_inputs = self.scales.shape[1] * self.group_size
        num_channels = self.scales.shape[0] * TILE
        return F.pad(weight_ND, (0, num_inputs - self.in_features, 0, num_channels - self.out_features))

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The decoded weights before scaling, ``int8[N, D]``, and the scales, ``[N, G]``; with padding."""
        return unpack(self.codes, self.bits, self.scales.shape[0]), self.scales.transpose(1, 2).flatten(0, 1)


class _Product(torch.autograd.Function):
    """The gradient reaches the input; weights are decoded again for it instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dequantized(x.dtype), layer._bias(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.layer.dequantized(gradient.dtype)).to(ctx.dtype), None


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """``float[..., D]`` to codes from -127 to 127, ``float32[..., D]``, and their scales, ``float32[..., 1]``, as in
    `kernels.c`. A row with a NaN or an infinity becomes NaN."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > LEAST, torch.full_like(largest, 127) / largest, 0)
    return (x * inverse).round(), largest / 127


def round_to_codes(weight_ND: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Finite ``float[N, D]`` to ``uint8[N, D]`` and ``bfloat16[N, G]``, identical to `kernels.c`."""
    grouped = weight_ND.unflatten(1, (-1, group_size))
    largest = grouped.abs().amax(-1)
    # A factor of a power of two for each group is exact, and keeps sums and inverses within the range of float32.
    factor = torch.where(largest > 2.0**46, 2.0**-87, torch.where(largest < 2.0**-46, 2.0**97, 1.0)).float()
    grouped = grouped * factor[..., None]
    scales = (largest / 127 if bits == 8 else _best_scales(grouped) / factor).bfloat16()
    inverse = torch.where(scales == 0, 0, 1 / (scales.float() * factor))
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    codes = (grouped * inverse[..., None]).round().clamp(least, most) + 2 ** (bits - 1)
    return codes.flatten(1).to(torch.uint8), scales


def _best_scales(grouped: Tensor) -> Tensor:
    """For each group in 4 bits, the scale with the least squared error of five ways to round it."""
    least, most = grouped.aminmax(dim=-1)
    extreme = torch.where(-least > most, least, most)[..., None]
    best = scales = torch.zeros_like(most)
    for end in (8, 7.5, 7, 8.5, 9):
        inverse = torch.full_like(extreme, -end) / extreme  # a number over a tensor is rounded twice
        codes = torch.where(extreme == 0, 0, grouped * inverse).round().clamp(-8, 7)
        product, square = _sum(grouped * codes), _sum(codes.square())
        is_better = product.square() > best * square
        scales = torch.where(is_better, product / square, scales)
        best = torch.where(is_better, product.square() / square, best)
    return scales


def _sum(grouped: Tensor) -> Tensor:
    """Sum over the last dimension in the order of ``kernels.c``: eight partial sums, then their sum."""
    for size in (LANES, 1):
        first, *others = grouped.split(size, dim=-1)
        grouped = sum(others, start=first)
    return grouped[..., 0]


def pack(codes_ND: Tensor, bits: int) -> Tensor:
    """Codes ``uint8[N, D]`` to bytes in the layout of ``kernels.c``."""
    tiles = codes_ND.unflatten(0, (-1, TILE))
    if bits == 8:
        return tiles.unflatten(2, (-1, 4)).transpose(1, 2).flatten()
    low, high = tiles.unflatten(2, (-1, 2, 4)).transpose(1, 2).unbind(3)
    return (low | high << 4).flatten()


def unpack(codes: Tensor, bits: int, num_tiles: int) -> Tensor:
    """Bytes to decoded weights, ``int8[N, D]``: the codes minus 128 or 8."""
    tiles = codes.view(num_tiles, -1, TILE, 4)
    if bits == 8:
        return (tiles ^ 0x80).view(torch.int8).transpose(1, 2).flatten(2).flatten(0, 1)
    both = torch.stack([tiles & 15, tiles >> 4], dim=3)
    return (both.to(torch.int8) - 8).transpose(1, 2).flatten(2).flatten(0, 1)
