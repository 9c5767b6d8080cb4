"""Prevents computation of a T5 in float16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from blip2.errors import OptionError
from blip2.layers import autocast_dtype, without_autocast

Method = TypeVar("Method", bound=Callable[..., Any])


def never_in_float16(method: Method) -> Method:
    """A T5's feed-forward layers overflow in float16, with nonsense as output. Weights in float16 are refused, and
    under float16 autocast the method computes in the dtype of the weights."""

    @wraps(method)
    def wrapper(self: Any, x: Tensor, *arguments: Any) -> Any:
        with own_precision(self, x.device) as is_changed:
            return method(self, x.to(self.dtype) if is_changed else x, *arguments)

    return wrapper  # type: ignore[return-value]


@contextmanager
def own_precision(model: Any, device: torch.device) -> Iterator[bool]:
    """See `never_in_float16`; yields whether autocast was float16, and disables it inside."""
    if model.dtype == torch.float16:
        raise OptionError("a T5 overflows in float16; use bfloat16 (model.to(torch.bfloat16)) or float32")
    if autocast_dtype(device) != torch.float16:
        yield False
        return
    with without_autocast(device):
        yield True
