"""Activation functions of feed-forward layers, by their names in `blip2.config`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"),
}  # fmt: skip
