"""The C kernels, if they were compiled: see ``kernels.c`` for what they compute, `build` for how they come about."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from blip2.quantized.build import LIBRARY

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels read and write, by the numbers that they know it by."""

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


@cache
def kernels() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not compiled, for another processor, or no OpenMP in this build of torch
        return None
    library.blip2_quantize.argtypes = [POINTER, INT, LONG, LONG, LONG, LONG, INT, POINTER, POINTER, INT]
    library.blip2_quantize.restype = None
    library.blip2_linear.argtypes = [
        POINTER, INT, LONG, LONG, LONG, LONG, INT, POINTER, POINTER, POINTER, LONG, POINTER, INT,
    ]  # fmt: skip
    library.blip2_prepare(0)
    return library


def can_multiply(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in TYPES and kernels() is not None


def quantize(weight_ND: Tensor, bits: int, group_size: int, codes: Tensor, scales: Tensor) -> None:
    """Fill ``codes`` and ``scales`` from ``float[N, D]`` (fp32 or bf16)."""
    library = kernels()
    assert library is not None
    channels, width = weight_ND.shape
    padded = scales.shape[1] * group_size
    weight_ND = weight_ND.contiguous()
    library.blip2_quantize(
        weight_ND.data_ptr(), TYPES[weight_ND.dtype], channels, width, padded, group_size, bits,
        codes.data_ptr(), scales.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, *, bits: int, group_size: int, channels: int
) -> Tensor:
    """``float[..., D]`` times the weights: ``float[..., N]``, of x's type. ``bias_N`` is fp32."""
    library = kernels()
    assert library is not None
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty((*x.shape[:-1], channels), dtype=x.dtype)
    failed = library.blip2_linear(
        x.data_ptr(), TYPES[x.dtype], x.numel() // width, width, scales.shape[1] * group_size, group_size, bits,
        codes.data_ptr(), scales.data_ptr(), None if bias_N is None else bias_N.data_ptr(), channels,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the product of a quantised layer")
    return out
