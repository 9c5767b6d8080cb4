"""Whether numbers are numbers: NaN and infinite ones come from damaged weights, or from an overflow."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from blip2.linear import readable


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; integers never are. Waits for a GPU."""
    if not values.is_floating_point() or not values.numel() or values.is_meta:
        return True
    # Takes no memory, as a mask would; both ends are NaN if any value is.
    return bool(torch.stack(readable(values).aminmax()).isfinite().all())


def first_not_finite(weights: nn.Module | Mapping[str, Tensor]) -> str | None:
    """The name of the first weight with a value that is NaN or infinite, or None. Reads all weights up to that one."""
    if isinstance(weights, nn.Module):
        weights = dict(chain(weights.named_parameters(), weights.named_buffers()))
    return next((name for name, weight in weights.items() if not is_finite(weight)), None)


def overflow(dtype: torch.dtype) -> str:
    """What to say, and to do, where every weight is finite and what is computed in ``dtype`` is not."""
    if dtype == torch.float16:
        return "numbers overflow in float16; load the model in bfloat16 or float32"
    return "numbers overflow, though no weight is NaN or infinite; the weights are those of another model, or damaged"
