"""Exponential moving average of the trained weights, which is evaluated and exported instead of the last step's
weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blip2.train.shard import own


class Average:
    """An exponential moving average of parameters, in their own dtype. Of sharded parameters each process keeps its own
    shard.

    With ``decay`` 0 no average is kept. The first steps use a smaller decay, (1 + t) / (10 + t) at step t, until that
    reaches ``decay``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.weights = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Add the weights after step 0, 1, ... to the average."""
        if self.weights:
            new = 1 - min(self._decay, (1 + step) / (10 + step))
            now = [own(parameter.detach()) for parameter in self._parameters.values()]
            torch._foreach_lerp_([own(weight) for weight in self.weights.values()], now, new)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the model's weights; a second call swaps them back."""
        for name, weight in self.weights.items():
            parameter = own(self._parameters[name].detach())
            before: Tensor = parameter.clone()
            parameter.copy_(own(weight))
            own(weight).copy_(before)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this context the model holds the average."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
