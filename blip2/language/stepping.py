"""Decides when a token passes all layers in one call of C: see `blip2.native.program`.

That needs quantised weights (8 or 4 bits) in all layers, all on the CPU, no observers (attention weights, hooks,
gradients), and the compiled kernels. Otherwise the layers run one by one, with the same results.

B rows, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from blip2 import native
from blip2.layers import KVCache, autocast_dtype, is_attention_recorded
from blip2.native.program import Program
from blip2.quantized import QuantizedLinear


def program_for(
    x_BTD: Tensor, cache: KVCache | None, blocks: nn.ModuleList, write: Callable[[Program], None]
) -> Program | None:
    """The program of these layers, if the next tokens can use it; ``write`` creates it for the first tokens of a
    cache."""
    if cache is None or x_BTD.shape[1] != 1 or torch.is_grad_enabled() or not native.can_take(x_BTD):
        return None
    if is_attention_recorded() or autocast_dtype(x_BTD.device) is not None:
        return None
    if cache.program is None:
        cache.program = False
        if all(is_plain(module, x_BTD.dtype) for module in blocks.modules()):
            cache.program = Program(x_BTD.shape[-1])
            write(cache.program)
    return cache.program or None


def run(program: Program, x_B1D: Tensor, positions_B1: Tensor, planes: Iterable[Tensor]) -> Tensor:
    """``float[B, 1, D]`` after all layers."""
    x_B1D = x_B1D.clone(memory_format=torch.contiguous_format)
    program.run(x_B1D[:, 0], positions_B1[:, 0].contiguous(), list(planes))
    return x_B1D


def as_plane(mask_BH1S: Tensor) -> Tensor:
    """A mask in the layout of programs: ``[B or 1, H or 1, S, 1]``."""
    return mask_BH1S.transpose(2, 3)


def is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module computes exactly what a program would."""
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or module.training:
        return False
    if isinstance(module, QuantizedLinear):
        return module.is_unmodified() and module.activation_bits == 15
    if isinstance(module, nn.Linear):
        return False
    return all(own.dtype == dtype and own.device.type == "cpu" for own in module.parameters(recurse=False))
