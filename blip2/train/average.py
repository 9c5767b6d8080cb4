"""The average of what learns, over the steps: evaluated and exported in the place of the last step's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blip2.train.shard import own


class Average:
    """An exponential moving average of parameters, in their precision; of shares, each process its own.

    ``decay`` 0 keeps none. At first, when there is little to average, less of the past stays: (1 + t) / (10 + t) at
    step t, as long as that is below ``decay``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.weights = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """The weights as they are after step 0, 1, ..."""
        if self.weights:
            new = 1 - min(self._decay, (1 + step) / (10 + step))
            now = [own(parameter.detach()) for parameter in self._parameters.values()]
            torch._foreach_lerp_([own(weight) for weight in self.weights.values()], now, new)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the model and the model's weights here, or back again."""
        for name, weight in self.weights.items():
            parameter = own(self._parameters[name].detach())
            before: Tensor = parameter.clone()
            parameter.copy_(own(weight))
            own(weight).copy_(before)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model is the average."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
