"""Compiled C kernels for the operations that dominate decoding on a CPU, if they exist.

See ``kernels.c`` for their computation and `build` for the compilation. The instruction set (`LEVELS`) is detected when
they are loaded; the results are identical on each. Without the kernels, torch's functions are used. Only for tensors on
the CPU, in fp32 or bf16, without gradients: see `can_take`.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2.native.build import LIBRARY, SOURCE, source_crc32

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that the kernels read and write, with their codes in C."""

LEVELS = ("any", "AVX2", "VNNI")
"""Supported instruction sets, by the numbers that ``blip2_prepare`` takes and returns."""

BYTES_A_THREAD = 4_000_000
"""Waking another thread costs more than reading fewer bytes."""

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
ARGUMENTS = {
    "blip2_prepare": [INT],
    "blip2_quantize": [POINTER, INT, LONG, LONG, LONG, LONG, INT, POINTER, POINTER, INT],
    "blip2_linear": [POINTER, INT, LONG, LONG, LONG, LONG, INT, POINTER, POINTER, POINTER, LONG, POINTER, INT],
    "blip2_linear_of_many": [
        POINTER, INT, LONG, LONG, LONG, POINTER, POINTER, POINTER, LONG, INT, POINTER, INT,
    ],
    "blip2_attend": [
        POINTER, POINTER, POINTER, POINTER, INT, LONG * 11, INT, LONG, LONG, LONG, LONG, FLOAT, POINTER, INT,
    ],
    "blip2_rms_norm": [POINTER, POINTER, INT, LONG, LONG, FLOAT, POINTER],
    "blip2_run": [POINTER, INT],
    "blip2_checksums": [POINTER, LONG, LONG, POINTER],
    "blip2_source": [],
    "blip2_greatest": [POINTER, POINTER, LONG, LONG, LONG, POINTER, INT],
}  # fmt: skip


@cache
def kernels() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    try:
        if sys.platform == "darwin":  # there the kernels find OpenMP only if it was loaded globally
            ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libomp.dylib"), ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(LIBRARY))
        for name, arguments in ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError):  # not compiled, another processor, torch without OpenMP, or outdated
        return None
    if is_stale(library):
        warnings.warn(f"{LIBRARY} was compiled from another kernels.c and is not used; compile it again: python "
            f"{SOURCE.with_name('build.py')}", stacklevel=2)  # fmt: skip
        return None
    library.blip2_prepare(len(LEVELS) - 1)
    return library


def is_stale(library: ctypes.CDLL) -> bool:
    """Whether a library was compiled from another source than the one beside it; False without a source."""
    return SOURCE.exists() and library.blip2_source() & 0xFFFFFFFF != source_crc32()


def can_take(*operands: Tensor) -> bool:
    """Whether kernels exist for an operation on these tensors, which have one dtype, and none needs a gradient. Other
    operands, masks and codes, are checked by the kernels."""
    dtype = operands[0].dtype
    if dtype not in TYPES or kernels() is None:
        return False
    if not all(each.dtype == dtype and each.device.type == "cpu" for each in operands):
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in operands))


def can_attend(query_BHTD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` supports this: one token for each row, contiguous head dimensions, a supported mask."""
    operands = (query_BHTD, key_BHSD, value_BHSD)
    if query_BHTD.shape[2] != 1 or any(each.stride(3) != 1 for each in operands):
        return False
    if mask is None or (mask.dtype == torch.bool and mask.device.type == "cpu"):
        return can_take(*operands)
    return can_take(*operands, mask)


def quantize(weight_ND: Tensor, bits: int, group_size: int, codes: Tensor, scales: Tensor) -> bool:
    """Fill ``codes`` and ``scales`` from ``float[N, D]``; False if a weight is NaN or infinite."""
    library = kernels()
    assert library is not None
    channels, width = weight_ND.shape
    padded = scales.shape[1] * group_size
    weight_ND = weight_ND.contiguous()
    is_not_finite = library.blip2_quantize(
        weight_ND.data_ptr(), TYPES[weight_ND.dtype], channels, width, padded, group_size, bits,
        codes.data_ptr(), scales.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return not is_not_finite


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, *, bits: int, group_size: int, channels: int
) -> Tensor:
    """``float[..., D]`` times quantised weights: ``float[..., N]``, of x's dtype. ``bias_N`` is fp32."""
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
        raise MemoryError("out of memory in a quantised layer")
    return out


def linear_of_many(
    x: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, *, padded: int, channels: int, has_gelu: bool
) -> Tensor | None:
    """As `linear` with 8 bits, with activations of 8 bits as well, optionally followed by a GELU: for many rows, where
    arithmetic dominates. None if there is no kernel for it."""
    library = kernels()
    assert library is not None
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty((*x.shape[:-1], channels), dtype=x.dtype)
    failed = library.blip2_linear_of_many(
        x.data_ptr(), TYPES[x.dtype], x.numel() // width, width, padded, codes.data_ptr(), scales.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(), channels, has_gelu, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed == 1:
        raise MemoryError("out of memory in a quantised layer")
    return None if failed else out


def attend(query_BH1D: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The attention of one token for each row, heads joined: ``float[B, 1, H * D]``.

    ``mask`` is bool (True: may attend), or of the query's dtype and added; ``[B or 1, H or 1, 1, S]``.
    """
    library = kernels()
    assert library is not None
    rows, heads, _, size = query_BH1D.shape
    length = key_BHSD.shape[2]
    out = torch.empty((rows, 1, heads * size), dtype=query_BH1D.dtype)
    q, k, v = query_BH1D.stride(), key_BHSD.stride(), value_BHSD.stride()
    strides = [q[0], q[1], k[0], k[1], k[2], v[0], v[1], v[2], 0, 0, 0]
    if mask is not None:
        shape, m = mask.shape, mask.stride()
        strides[8:] = [m[0] if shape[0] > 1 else 0, m[1] if shape[1] > 1 else 0, m[3] if shape[3] > 1 else 0]
    failed = library.blip2_attend(
        query_BH1D.data_ptr(), key_BHSD.data_ptr(), value_BHSD.data_ptr(), None if mask is None else mask.data_ptr(),
        0 if mask is None else 2 if mask.dtype == torch.bool else 1, (LONG * 11)(*strides), TYPES[query_BH1D.dtype],
        rows, heads, length, size, scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("out of memory in the attention of a token")
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / rms(x)`` over the last dimension, of x's dtype."""
    library = kernels()
    assert library is not None
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    library.blip2_rms_norm(
        x.data_ptr(), weight.data_ptr(), TYPES[x.dtype], x.numel() // width, width, eps, out.data_ptr()
    )
    return out


def greatest(vectors_NRL: Tensor, query_L: Tensor) -> Tensor | None:
    """The maximum product of each N's vectors ``float16[N, R, L]`` with ``float32[L]``, summed in float32:
    ``float32[N]``. None if there is no kernel for it."""
    library = kernels()
    if library is None or not vectors_NRL.is_contiguous():
        return None
    out = torch.empty(len(vectors_NRL), dtype=torch.float32)
    query_L = query_L.contiguous()
    threads = min(torch.get_num_threads(), 1 + vectors_NRL.nbytes // BYTES_A_THREAD)
    failed = library.blip2_greatest(
        vectors_NRL.data_ptr(), query_L.data_ptr(), *vectors_NRL.shape, out.data_ptr(), threads
    )
    return None if failed else out


def checksums(rows: Tensor) -> np.ndarray | None:
    """The CRC-32 of each row's bytes, ``uint32[N]``, of a tensor ``[N, ...]``. None if there is no kernel for it."""
    library = kernels()
    if library is None or not rows.is_contiguous():
        return None
    out = np.empty(len(rows), np.uint32)
    failed = library.blip2_checksums(rows.data_ptr(), len(rows), rows.nbytes // max(len(rows), 1), out.ctypes.data)
    return None if failed else out
