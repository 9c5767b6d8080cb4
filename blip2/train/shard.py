"""Sharded weights: each process keeps a share of a language model or image encoder that does not fit on one device.

Uses torch's FSDP2. A layer gathers its weights from all processes for its forward and backward pass and then frees
them. Gradients and updates of trained weights in such a part are sharded as well. Small weights (norms) and the other
parts are whole in every process. All processes have to compute equally often.
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
"""Methods, besides calling the module, that start a computation with its weights."""


def shard(model: nn.Module, parts: Sequence[str], group: Group, device: torch.device) -> None:
    """Shard the weights of ``parts`` ("language", "vision") on the device; everything else stays whole.

    The parts may be elsewhere (on the CPU) before: the weights move to the device one at a time. ``requires_grad`` has
    to be set before. Nothing is communicated. Raises RecipeError if torch is too old.
    """
    if group.size == 1:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise RecipeError(f"shard: needs torch 2.8 or newer, but this is {torch.__version__}; update torch, or remove "
            "this key")
    # No code here changes the output of a module in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (group.size,))
    for name, part in model.named_children():
        if name not in parts:
            part.to(device)
            continue
        managed: list[nn.Module] = [module for module in part.modules() if isinstance(module, PRODUCTS)]
        for module in managed:
            for key, weight in module.named_parameters(recurse=False):  # plain ones, see `blip2.linear`
                setattr(module, key, nn.Parameter(readable(weight).contiguous(), weight.requires_grad))
            fully_shard(module, mesh=mesh)
        small = {parameter for parameter in part.parameters() if not is_share(parameter)}
        for parameter in small:
            parameter.data = parameter.data.to(device)
        fully_shard(part, mesh=mesh, ignored_params=small)
        for module in (*managed, part):
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # the shares of a loss are summed
            module.set_force_sum_reduction_for_comms(True)  # else it multiplies by 1.0, which gloo does not support
            for method in METHODS:
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def is_share(tensor: Tensor) -> bool:
    """Whether the tensor is a shard of a larger one."""
    return hasattr(tensor, "full_tensor")


def any_shares(tensors: Iterable[Tensor]) -> bool:
    return any(map(is_share, tensors))


def own(tensor: Any) -> Tensor:
    """This process's part of the tensor; all of it if it is whole."""
    return tensor.to_local() if is_share(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """The whole tensor. For a shard, all processes have to call this together."""
    return tensor.full_tensor() if is_share(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor, group: Group) -> None:
    """Copy a value, which this process has in full, or this process's share of it into a tensor."""
    if is_share(tensor):
        width = -(-len(value) // group.size)
        value = value[group.rank * width : (group.rank + 1) * width]
    own(tensor).copy_(value)


def first_bad(parameters: Mapping[str, Tensor], group: Group) -> str | None:
    """`first_not_finite` for shards as well; all processes have to call this together."""
    name = first_not_finite({name: own(parameter) for name, parameter in parameters.items()})
    if not any_shares(parameters.values()):
        return name
    return next((found for found in group.objects(name) if found is not None), None)


@torch.no_grad()
def gather(model: nn.Module, group: Group, *, needs_frozen: bool) -> None:
    """Make the first process's model whole again on the CPU, to save it; the model cannot compute any more.

    Without ``needs_frozen``, frozen weights keep only their shape.
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
