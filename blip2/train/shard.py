"""Weights of which each process keeps a share: for a language model, or an image encoder, that a device does not hold.

By torch's FSDP2. A product gets its weights from all processes for the moment that it is computed, forward and
backward, and forgets them. What learns in such a part is summed and changed share by share; what is small (norms) or
outside of the parts is whole in every process. All processes have to compute as often as one another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip2.errors import RecipeError
from blip2.finite import first_not_finite
from blip2.linear import readable
from blip2.train.group import Group

PRODUCTS = (nn.Linear, nn.Embedding, nn.Conv2d)
METHODS = ("embed", "encode", "decode", "logits", "prefill", "step", "features", "scores")
"""Beside a call of the module, what begins to compute with its weights."""


def shard(model: nn.Module, parts: Sequence[str], group: Group, device: torch.device) -> None:
    """Keep a share of the weights of ``parts`` ("language", "vision") on the device, and all else whole.

    The parts may lie elsewhere (on the CPU) before: each weight comes to the device by itself. What learns has to be
    set before. Nothing is sent. Raises RecipeError if torch is too old.
    """
    if group.size == 1:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise RecipeError(f"shard: needs torch 2.8 or newer, and this is {torch.__version__}; update it, or remove it")
    # Nobody here changes in place what a module returned.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (group.size,))
    for name, part in model.named_children():
        if name not in parts:
            part.to(device)
            continue
        managed: list[nn.Module] = [module for module in part.modules() if isinstance(module, PRODUCTS)]
        for module in managed:
            for key, weight in module.named_parameters(recurse=False):  # ordinary ones, see `blip2.linear`
                setattr(module, key, nn.Parameter(readable(weight).contiguous(), weight.requires_grad))
            fully_shard(module, mesh=mesh)
        small = {parameter for parameter in part.parameters() if not is_share(parameter)}
        for parameter in small:
            parameter.data = parameter.data.to(device)
        fully_shard(part, mesh=mesh, ignored_params=small)
        for module in (*managed, part):
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # shares of a loss are summed
            module.set_force_sum_reduction_for_comms(True)  # else a product with 1.0, which gloo has not
            for method in METHODS:
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def is_share(tensor: Tensor) -> bool:
    """Whether other processes have the rest of it."""
    return hasattr(tensor, "full_tensor")


def any_shares(tensors: Iterable[Tensor]) -> bool:
    return any(map(is_share, tensors))


def own(tensor: Any) -> Tensor:
    """What this process has of it; all of what is whole."""
    return tensor.to_local() if is_share(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of it: of a share, all processes have to ask together."""
    return tensor.full_tensor() if is_share(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor, group: Group) -> None:
    """Put all of a value, which this process has, or its share of it, into a tensor."""
    if is_share(tensor):
        width = -(-len(value) // group.size)
        value = value[group.rank * width : (group.rank + 1) * width]
    own(tensor).copy_(value)


def first_bad(parameters: Mapping[str, Tensor], group: Group) -> str | None:
    """`first_not_finite` for shares, too, which all processes have to ask together."""
    name = first_not_finite({name: own(parameter) for name, parameter in parameters.items()})
    if not any_shares(parameters.values()):
        return name
    return next((found for found in group.objects(name) if found is not None), None)


@torch.no_grad()
def gather(model: nn.Module, group: Group, *, needs_frozen: bool) -> None:
    """Make the first process's model whole again, on the CPU, to be saved: nothing computes with it any more.

    Without ``needs_frozen`` what did not learn has only its shape.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not is_share(parameter):
                continue
            if needs_frozen or parameter.requires_grad:
                value = whole(parameter.detach()).cpu()
            else:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            if group.is_first:
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
