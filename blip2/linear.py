"""Linear layers whose weights on a CPU are in oneDNN's memory layout.

A product with few rows (decoding) takes up to twice as long with plain weights, which oneDNN reorders each time. So
large weights are packed in oneDNN's layout while the model generates. They are unpacked when anything changes them or
takes a view of them, until the next generation. From outside it is one `torch.nn.Parameter` that behaves as usual: see
`Weight`.

N outputs, D inputs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

MIN_PACKED_WEIGHTS = 2**20
"""With fewer weights than this, in fp32, a product with one row is slower with packed weights."""

ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
# Functions that expose a tensor's memory.
OF_MEMORY = {
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor._typed_storage, Tensor.numpy, Tensor.__array__,
    Tensor.share_memory_, Tensor.is_shared, Tensor.is_pinned, Tensor.__dlpack__, Tensor.__dlpack_device__,
}  # fmt: skip


class _WithWeight(nn.Module):
    """A module whose ``weight`` may be a `Weight`."""

    weight: Any

    def keep(self, weight_ND: Tensor, *, packs: bool = False) -> None:
        """Store a tensor as the weight, as a `Weight` if that is faster; ``packs``: packed at once."""
        self.weight = nn.Parameter(weight_ND, requires_grad=self.weight.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`nn.Module.to`; on other devices than the CPU an ordinary parameter replaces a `Weight`."""
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")  # absent if it is computed from others (parametrizations)
        if type(weight) is Weight and weight.device.type != "cpu":
            self.weight = nn.Parameter(readable(weight), weight.requires_grad)
            self.weight.grad = weight.grad
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        if type(weight) is Weight and not keep_vars:  # an ordinary tensor that shares memory, like all others
            destination[prefix + "weight"] = weight.numbers.shared()


class Linear(_WithWeight, nn.Linear):
    """An ``nn.Linear`` with the same parameters, state and results, faster on a CPU if its weight is a `Weight`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.keep(self.weight.detach())

    def keep(self, weight_ND: Tensor, *, packs: bool = False) -> None:
        if _can_be_packed(weight_ND):
            make = Weight.packed_at_once if packs else Weight
            self.weight = make(weight_ND, self.weight.requires_grad)
        else:
            super().keep(weight_ND)

    def forward(self, x: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., N]``."""
        return linear(x, self.weight, self.bias)


class Table(_WithWeight, nn.Embedding):
    """Token embeddings that are also the output layer (tied), as in OPT.

    On a CPU in bfloat16 the output layer uses a packed copy of the table, made at the first generation.
    """

    def __init__(self, num_tokens: int, width: int, padding_idx: int | None = None) -> None:
        super().__init__(num_tokens, width, padding_idx)
        self.keep(self.weight.detach())

    def keep(self, weight_ND: Tensor, *, packs: bool = False) -> None:
        if weight_ND.dtype == torch.bfloat16 and _can_be_packed(weight_ND):
            self.weight = Weight(weight_ND, self.weight.requires_grad, keeps_plain=True)
        else:
            super().keep(weight_ND)

    def scores(self, hidden: Tensor) -> Tensor:
        """``float[..., D]`` times the table: ``float[..., V]``."""
        weight = self.weight
        is_large = weight.dtype == torch.float32 and is_worth_packing(weight.dtype, weight.numel())
        if type(weight) is nn.Parameter and is_large and _suits(hidden, weight) and not _learns(hidden, weight):
            # With few rows oneDNN takes half the time of `F.linear`, even with the plain layout.
            return _product(hidden, weight, None)
        return linear(hidden, weight, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, with oneDNN if the weight is a `Weight` and needs no gradient."""
    if type(weight) is not Weight or not _suits(x, weight) or _learns(weight, bias):
        return F.linear(x, weight, bias)
    packed = weight.numbers.packed()
    if packed is None:
        return F.linear(x, weight, bias)
    return _Product.apply(x, packed, bias) if _learns(x) else _product(x, packed, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can compute the product: one dtype, on the CPU, and no autocast to another."""
    is_here = x.device.type == "cpu" and weight.device.type == "cpu"
    return x.dtype == weight.dtype and is_here and not torch.is_autocast_enabled("cpu")


def _learns(*tensors: Tensor | None) -> bool:
    """Whether any tensor needs a gradient."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def is_worth_packing(dtype: torch.dtype, num_weights: int) -> bool:
    """Whether packing this many weights makes products with few rows faster on this processor."""
    if not torch.backends.mkldnn.is_available():  # torch builds for some processors lack it
        return False
    if dtype == torch.bfloat16:
        return num_weights > 0 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and num_weights >= max(MIN_PACKED_WEIGHTS, 1)


def _can_be_packed(weight_ND: Tensor) -> bool:
    is_matrix = weight_ND.device.type == "cpu" and weight_ND.dim() == 2
    return is_matrix and is_worth_packing(weight_ND.dtype, weight_ND.numel())


def readable(tensor: Tensor) -> Tensor:
    """An ordinary tensor without gradient, for reading only."""
    return tensor.numbers.read() if isinstance(tensor, Weight) else tensor.detach()


class Numbers:
    """The values of a weight: plain, packed, or (``keeps_plain``) both."""

    def __init__(self, plain_ND: Tensor | None, packed: Tensor | None = None, *, keeps_plain: bool = False) -> None:
        self._plain = plain_ND
        self._packed = packed
        self._keeps_plain = keeps_plain
        self._lock = threading.RLock()

    def read(self) -> Tensor:
        """Plain values ``[N, D]`` for reading only, perhaps a temporary copy."""
        with self._lock:
            plain, packed = self._plain, self._packed
        if plain is not None:
            return plain.detach()
        assert packed is not None
        with torch.inference_mode(False):
            return packed.to_dense()

    def shared(self) -> Tensor:
        """Plain values ``[N, D]`` in the weight's own memory, for views and changes."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._plain is None:
                assert self._packed is not None
                self._plain = self._packed.to_dense()
            self._packed = None
            return self._plain.detach()

    def packed(self) -> Tensor | None:
        """The packed values; None while anything else, also another process, holds the plain memory and might change
        it."""
        if self._packed is not None:
            return self._packed
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._packed is None:
                assert self._plain is not None
                if not _can_be_packed(self._plain) or _num_holders(self._plain) > 1 or self._plain.is_shared():
                    return None
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self._plain, None)
                if not self._keeps_plain:
                    self._plain = None
            return self._packed

    def replace(self, plain_ND: Tensor) -> None:
        with self._lock:
            self._plain, self._packed = plain_ND, None

    def copy(self) -> Numbers:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            plain, packed = (None if each is None else each.clone() for each in (self._plain, self._packed))
            return Numbers(plain, packed, keeps_plain=self._keeps_plain)


def _num_holders(plain: Tensor) -> int:
    """Number of tensors, arrays and storages that share a tensor's memory, including itself."""
    storage = plain.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    # Minus the references of this call. Other holders share the same object, which is also referenced by the memory
    # itself, this function and the calling one.
    return count - 1 + sys.getrefcount(storage) - 3


class Weight(nn.Parameter):
    """A `torch.nn.Parameter` ``float[N, D]`` whose values may be packed in oneDNN's layout.

    Operations that only read get temporary plain values. Operations that change them or return a view unpack them until
    the next product in generation. Copies, pickles and gradients are those of an ordinary parameter.
    """

    numbers: Numbers

    @staticmethod
    def __new__(cls: type[Weight], data: Tensor, requires_grad: bool = True, *, keeps_plain: bool = False) -> Weight:
        """``keeps_plain``: for tables whose rows are also looked up; both layouts are kept during generation."""
        plain = readable(data)
        if not _can_be_packed(plain):  # such as meta tensors of accelerate
            return nn.Parameter(plain, requires_grad)  # type: ignore[return-value]
        return cls._of(Numbers(plain.contiguous(), keeps_plain=keeps_plain), plain, requires_grad)

    @classmethod
    def _of(cls, numbers: Numbers, like: Tensor, requires_grad: bool) -> Weight:
        """With the shape, dtype and device of a tensor."""
        with torch.inference_mode(False):
            weight: Weight = Tensor._make_wrapper_subclass(
                cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=requires_grad
            )
        weight.numbers = numbers
        weight._is_param = True
        return weight

    @classmethod
    def packed_at_once(cls, data: Tensor, requires_grad: bool = True) -> Weight:
        """Packed from the start. ``data`` is not kept, whoever else holds it."""
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(data, None)
        return cls._of(Numbers(None, packed), data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        if id(self) not in memo:
            copied = self._of(self.numbers.copy(), self, self.requires_grad)
            memo[id(self)] = copied
            if self.grad is not None:
                copied.grad = self.grad.clone()
        copied = memo[id(self)]
        assert isinstance(copied, Weight)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        keeps_plain = self.numbers._keeps_plain
        return _rebuilt, (self.numbers.read(), self.requires_grad, keeps_plain)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{self.numbers.read().requires_grad_(self.requires_grad)!r}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args else None
        if isinstance(weight, Weight):
            if func in OF_MEMORY:
                out = func(weight.numbers.shared(), *args[1:], **kwargs)
                return weight if func is Tensor.share_memory_ else out
            if func == _SET_DATA:  # created at each access, so compared by value
                return weight._set_data(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def _set_data(self, data: Tensor) -> None:
        """``weight.data = data`` of any dtype and device, as used by modules that do not know this class."""
        if isinstance(data, Weight) and data.numbers is self.numbers:
            return
        plain = data.numbers.shared() if isinstance(data, Weight) else data.detach()
        copied = self._of(Numbers(plain), plain, False)
        with torch._C.DisableTorchFunctionSubclass():
            _SET_DATA(self, copied)
        self.numbers = copied.numbers

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in ALIASES:
            weight = args[0]
            return cls._of(weight.numbers, weight, False)
        originals: dict[int, Weight] = {}

        def plain(argument: Any, is_shared: bool) -> Any:
            if not isinstance(argument, Weight):
                return argument
            tensor = argument.numbers.shared() if is_shared else argument.numbers.read()
            originals[id(tensor)] = argument
            return tensor

        wanted = func._schema.arguments
        named = {argument.name: argument.alias_info is not None for argument in wanted}
        new_args = [
            tree_map(lambda each, shared=wanted[place].alias_info is not None: plain(each, shared), argument)
            for place, argument in enumerate(args)
        ]
        new_kwargs = {
            name: tree_map(lambda each, shared=named[name]: plain(each, shared), argument)
            for name, argument in (kwargs or {}).items()
        }
        return tree_map(lambda each: originals.get(id(each), each), func(*new_args, **new_kwargs))


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _rebuilt(plain_ND: Tensor, requires_grad: bool, keeps_plain: bool) -> nn.Parameter:
    """From a pickle, perhaps on another processor."""
    return Weight(plain_ND, requires_grad, keeps_plain=keeps_plain)


torch.serialization.add_safe_globals([_rebuilt])  # so that `torch.load` accepts these parameters


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    """A product with frozen weights; the gradient reaches only the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return _product(x, packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.packed.to_dense(), None, None
