"""The optimiser: AdamW with linear warm-up and a cosine schedule, step by step (section 3.4 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2.train.group import Group
from blip2.train.recipes import OptimRecipe
from blip2.train.shard import any_shares, is_share, own


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(
    parameters: dict[str, nn.Parameter], recipe: OptimRecipe, shares: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW with weight decay on weights, but not on biases, norms and scalars (as in the authors' code).

    ``shares``: factors of the learning rate by parameter name, 1 if absent; see `set_rate`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(((shares or {}).get(name, 1.0), parameter.dim() >= 2), []).append(parameter)
    entries: list[dict[str, Any]] = [
        {"params": some, "weight_decay": recipe.weight_decay if decays else 0.0, "share": share}
        for share, decays in sorted(groups, reverse=True)
        for some in _apart(groups[share, decays])
    ]
    return torch.optim.AdamW(entries, lr=recipe.peak_lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each parameter: its factor times ``rate``. The authors' code computes such factors but
    does not use them."""
    for entry in optimizer.param_groups:
        entry["lr"] = rate * entry["share"]


def _apart(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole and sharded parameters apart: one call of a torch function takes only one kind."""
    shares = [parameter for parameter in parameters if is_share(parameter)]
    return [[p for p in parameters if not is_share(p)], shares] if shares else [parameters]


@torch.no_grad()
def clip_gradients(group: Group, parameters: dict[str, nn.Parameter], most: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``most`` (0: no clipping); returns the norm before."""
    found = [p.grad for p in parameters.values() if p.grad is not None]
    norm = nn.utils.get_total_norm([gradient for gradient in found if not is_share(gradient)])
    if any_shares(found):
        rest = nn.utils.get_total_norm([own(gradient) for gradient in found if is_share(gradient)])
        norm = (norm.square() + group.sum(rest.square())).sqrt()
    if most:
        torch._foreach_mul_([own(gradient) for gradient in found], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


@torch.no_grad()
def sum_gradients(group: Group, parameters: dict[str, nn.Parameter], scalars: Tensor) -> None:
    """All-reduce the gradients, and the values ``scalars`` float[N] with them, in place, in one call.

    All processes have gradients for the same parameters. Frozen parameters have none and are not sent. Gradients of
    shards are already summed.
    """
    if group.size == 1:
        return
    found = [p.grad for p in parameters.values() if p.grad is not None]
    tensors = [*(gradient for gradient in found if not is_share(gradient)), scalars]
    flat = group.sum(torch.cat([tensor.flatten() for tensor in tensors]))
    sums = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(sums, tensors, strict=True)])


def learning_rate(step: int, recipe: OptimRecipe) -> float:
    """Learning rate of step 0, 1, ...: linear to the peak in ``warmup_steps``, then half a cosine down to ``min_lr`` at
    the last step."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - 1 - recipe.warmup_steps)
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
