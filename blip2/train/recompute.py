"""Recompute activations in the backward pass instead of keeping them: more arithmetic, less memory.

Only the input of each layer is kept. The recomputed values are identical, dropout included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blip2.dropout import replayed_dropout


def recompute(model: nn.Module, parts: Sequence[str]) -> None:
    """Recompute the activations of the layers of ``parts`` ("language", "qformer", "vision") in the backward pass."""
    for part in parts:
        for layer in _layers(model.get_submodule(part)):
            layer.forward = _again(layer.forward)


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    """The layers of each stack (a T5 has two)."""
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=replayed_dropout, **options)

    return compute
