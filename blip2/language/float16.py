"""Why a T5 is never computed in float16, and how that is kept."""

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
    """A T5's feed-forward layers overflow in float16, and its answers are nonsense: refused as the precision of the
    weights, and where autocast asks for it the method computes in the weights' own."""

    @wraps(method)
    def wrapper(self: Any, x: Tensor, *arguments: Any) -> Any:
        with own_precision(self, x.device) as is_changed:
            return method(self, x.to(self.dtype) if is_changed else x, *arguments)

    return wrapper  # type: ignore[return-value]


@contextmanager
def own_precision(model: Any, device: torch.device) -> Iterator[bool]:
    """See `never_in_float16`; whether autocast asked for it, and is off within."""
    if model.dtype == torch.float16:
        raise OptionError("a T5 overflows in float16; use bfloat16, by model.to(torch.bfloat16), or float32")
    if autocast_dtype(device) != torch.float16:
        yield False
        return
    with without_autocast(device):
        yield True
