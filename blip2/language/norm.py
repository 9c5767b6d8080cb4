"""The norm of T5 and of Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2 import native


class RMSNorm(nn.Module):
    """Divides by the root mean square (in fp32) and scales; no mean, no bias. ``offset`` is added to the weights; the
    product is then in fp32."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((width,), 1 - offset))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset and x.dtype == torch.float32 else self.weight
        is_rounded_once = self.offset and x.dtype != torch.float32
        if not is_rounded_once and native.can_take(x, weight):
            return native.rms_norm(x, weight, self.eps)
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if is_rounded_once:
            return (normed * (weight.float() + self.offset)).to(x.dtype)
        return weight * normed.to(weight.dtype)
