"""A device without hardware: "npu", computed by the CPU, that is as strict as an accelerator is, and counts.

Tensors of it are of a class of their own, so that an operation on tensors of two devices is seen, and refused as a GPU
refuses it; so is one that only a CPU has. `Counts` says how many operations were asked for and how often somebody
waited: each value that comes to the CPU is a moment in which an accelerator has nothing to do.

torch is told of the device once in a process, at the first `pretended`; outside of it nothing is different.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "npu"
MOVES = {"aten::_to_copy", "aten::to", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
"""torch takes indices from the CPU for a tensor of the GPU, at the price of a copy."""
ASKING = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero"}
"""What gives Python a value."""
OF_UNKNOWN_SIZE = {"aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}
"""A GPU has to be waited for, to know how large the result is."""
ONLY_CPU = ("mkldnn::", "onednn::", "quantized::")


@dataclass
class Counts:
    """Since the start or the last `clear`. ``waits`` for values; ``sent``: copies from the CPU, by operation."""

    operations: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.operations = 0
        self.waits.clear()
        self.sent.clear()


class Remote(Tensor):
    """A tensor of the device; ``near`` has its values."""

    near: Tensor

    @staticmethod
    def __new__(cls: type[Remote], near: Tensor) -> Remote:
        with torch.inference_mode(False):  # what torch takes views of has to be ordinary
            return Tensor._make_wrapper_subclass(
                cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
                device=torch.device(NAME, 0),
            )  # fmt: skip

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Remote({self.near})"

    def tolist(self) -> Any:
        """torch reads the memory of a tensor for it."""
        _counts.waits["tolist"] += 1
        return self.near.tolist()

    def untyped_storage(self) -> Any:
        """By which is known what shares its memory."""
        return self.near.untyped_storage()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def __getitem__(self, index: Any) -> Any:
        """torch makes tensors of lists, where no mode is asked."""
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class Making(TorchDispatchMode):
    """Takes care of what makes a tensor of the device from none: zeros, ranges, copies from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Remote) or _is_ours(leaf) for leaf in leaves):
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)


def _is_ours(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == NAME


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    counts, name = _counts, func._schema.name
    counts.operations += 1
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = [each for each in tensors if isinstance(each, Remote)]
    near = [each for each in tensors if not isinstance(each, Remote)]
    if name.startswith(ONLY_CPU):
        raise RuntimeError(f"{func} is of the CPU, and was asked for on {NAME}")
    if name in INDEXED and isinstance(args[0], Remote):
        counts.sent[name] += len(near)
    elif name not in MOVES and remote and any(each.dim() for each in near):  # a number of the CPU goes with any
        raise RuntimeError(f"operands of two devices, {NAME} and cpu: {func}")
    target = _target(name, args, kwargs)
    if name in ASKING | OF_UNKNOWN_SIZE or (remote and target == "cpu"):
        counts.waits[name] += 1
    elif name in MOVES and not isinstance(args[-1 if name == "aten::copy_" else 0], Remote):
        counts.sent[name] += 1
    changed = {id(each.near): each for each in remote}

    def here(value: Any) -> Any:
        return value.near if isinstance(value, Remote) else torch.device("cpu") if _is_ours(value) else value

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor) or target == "cpu":
            return value
        return changed.get(id(value)) if id(value) in changed else Remote(value)

    new_args, new_kwargs = tree_map(here, args), tree_map(here, kwargs)
    new_kwargs.pop("pin_memory", None)
    out = func(*new_args, **new_kwargs)
    return args[0] if name == "aten::copy_" else tree_map(there, out)


def _target(name: str, args: Any, kwargs: dict[str, Any]) -> str:
    """The kind of device that the result is on."""
    if name == "aten::copy_":
        return str(args[0].device.type)
    asked = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.device)]
    if name == "aten::to" and isinstance(args[-1], Tensor) and len(args) > 1:  # where the other one is
        asked = [args[1].device]
    return str(asked[0].type) if asked else NAME


class _Module(_DummyBackendModule):
    """What torch asks of `torch.npu`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_counts = Counts()


@cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())


@contextmanager
def pretended() -> Iterator[Counts]:
    """Within, the device is there, for this thread and those that it starts; what is asked of it is counted."""
    _register()
    _counts.clear()
    make, generator, run = torch.tensor, torch.Generator, threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with Making():  # a mode is a thread's own
            run(thread)

    class Generator(generator):  # type: ignore[misc,valid-type]
        """The CPU draws the numbers."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return generator()

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """As `torch.tensor`, which does not ask what a mode has to say about the device."""
        made = make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    with pytest.MonkeyPatch.context() as patch, Making():
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(threading.Thread, "run", run_with_device)
        yield _counts
