"""Checks for NaN and infinite values, which come from damaged weights or an overflow."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from blip2.linear import readable


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; integers always pass. Waits for a GPU."""
    if not values.is_floating_point() or not values.numel() or values.is_meta:
        return True
    # Needs no memory for a mask; min and max are NaN if any value is.
    return bool(torch.stack(readable(values).aminmax()).isfinite().all())


def first_not_finite(weights: nn.Module | Mapping[str, Tensor]) -> str | None:
    """The name of the first weight with a value that is NaN or infinite, or None. Reads the weights up to that one."""
    if isinstance(weights, nn.Module):
        weights = dict(chain(weights.named_parameters(), weights.named_buffers()))
    return next((name for name, weight in weights.items() if not is_finite(weight)), None)


def overflow(dtype: torch.dtype) -> str:
    """Explanation and remedy if all weights are finite, but a result in ``dtype`` is not."""
    if dtype == torch.float16:
        return "numbers overflow in float16; load the model in bfloat16 or float32"
    return "numbers overflow, though no weight is NaN or infinite; the weights are those of another model, or damaged"
