"""One token of every row through all layers of a language model, in one call of ``program.c``.

A model with quantised layers writes its step as a `Program`, once for each answer; each token then takes only the time
of reading the weights. The results, including rounding, are those of the layers.

B rows, H heads, S slots, D head size, W width of a buffer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip2.native import TYPES, kernels

RMS_NORM, LAYER_NORM, LINEAR, ADD, TURN, WRITE, ATTEND, ACTIVATE = range(8)
FUNCTIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_new": 3}
X = 0
"""The first buffer: input and output."""
BYTES_A_THREAD = 200_000
"""Average weight bytes of a product for each thread: with fewer, threads wait for each other longer than they gain."""


class Operation(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_long), ("source", ctypes.c_long), ("target", ctypes.c_long),
        ("weights", ctypes.c_void_p * 3), ("sizes", ctypes.c_long * 9), ("numbers", ctypes.c_float * 2),
    ]  # fmt: skip


class Plane(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("row", ctypes.c_long), ("head", ctypes.c_long), ("slot", ctypes.c_long),
        ("slots", ctypes.c_long), ("length", ctypes.c_long),
    ]  # fmt: skip


class Run(ctypes.Structure):
    _fields_ = [
        ("operations", ctypes.c_void_p), ("count", ctypes.c_long), ("widths", ctypes.c_void_p),
        ("buffers", ctypes.c_long), ("planes", ctypes.c_void_p), ("positions", ctypes.c_void_p),
        ("x", ctypes.c_void_p), ("type", ctypes.c_long), ("rows", ctypes.c_long),
    ]  # fmt: skip


class Planes(NamedTuple):
    """The tensors of a step that a layer reads, as indices into the list of `Program.run`. ``keys``, ``values``
    ``float[B, H, S or more, D]``; ``mask`` ``bool`` or ``float[B or 1, H or 1, S, 1]``, as in `blip2.layers.attend`;
    ``cos``, ``sin`` ``float[B or 1, 1, 1, R]``, None without rotary positions."""

    keys: int
    values: int
    mask: int
    cos: int | None = None
    sin: int | None = None
    has_bool_mask: bool = True


class Program:
    """Operations on numbered buffers ``float[B, W]``, and on the planes of a step: other tensors that are given for
    each token, by their index in a list. Weights are referenced, so that their memory stays valid."""

    def __init__(self, width: int) -> None:
        """``width``: of `X`."""
        self.widths = [width]
        self._names = {"x": X}
        self._operations: list[Operation] = []
        self._kept: list[Tensor] = []
        self._num_bytes = self._num_products = 0
        self._ready: Any = None

    def buffer(self, name: str, width: int) -> int:
        """The number of a named buffer; layers share buffers."""
        if name not in self._names:
            self._names[name] = len(self.widths)
            self.widths.append(width)
        assert self.widths[self._names[name]] == width, name
        return self._names[name]

    def norm(self, norm: Any, source: int, target: int, *, first: int = 0, count: int = 1) -> None:
        """An `RMSNorm` or LayerNorm of ``count`` heads each, from an offset of the buffer on."""
        bias = getattr(norm, "bias", None)
        kind = LAYER_NORM if isinstance(norm, torch.nn.LayerNorm) else RMS_NORM
        offset = getattr(norm, "offset", 0.0)
        self._add(kind, source, target, (norm.weight, bias), (count, len(norm.weight), first), (norm.eps, offset))

    def linear(self, layer: Any, source: int, name: str) -> int:
        """A `QuantizedLinear`; returns the number of the named buffer with its result."""
        target = self.buffer(name, layer.out_features)
        padded = layer.scales.shape[1] * layer.group_size
        sizes = (layer.in_features, padded, layer.group_size, layer.bits, layer.out_features)
        self._add(LINEAR, source, target, (layer.codes, layer.scales, layer.bias), sizes)
        self._num_bytes += layer.codes.nbytes
        self._num_products += 1
        return target

    def add(self, source: int, target: int, factor: float = 1.0) -> None:
        self._add(ADD, source, target, numbers=(factor, 0.0))

    def turn(self, source: int, planes: Planes, *, first: int, stride: int, heads: int) -> None:
        """`blip2.language.rotary.Turn`: rotates as many dimensions of each head as cosines and sines have; nothing
        without."""
        if planes.cos is not None and planes.sin is not None:
            self._add(TURN, source, source, sizes=(first, stride, heads, planes.cos, planes.sin))

    def write(
        self, source: int, planes: Planes, *, firsts: tuple[int, int], stride: int, heads: int, size: int
    ) -> None:
        """Write keys and values of each row, which begin at ``firsts``, into the slot of its position."""
        for first, plane in zip(firsts, (planes.keys, planes.values), strict=True):
            self._add(WRITE, source, source, sizes=(first, stride, heads, size, plane))

    def attend(
        self, source: int, name: str, planes: Planes, *, stride: int, heads: int, size: int, sharing: int = 1,
        scale: float | None = None, cap: float | None = None,
    ) -> int:  # fmt: skip
        """`blip2.layers.attend` of the first heads; ``sharing``: number of query heads that share keys and values."""
        target = self.buffer(name, heads * size)
        kind = 2 if planes.has_bool_mask else 1
        sizes = (0, stride, heads, size, sharing, planes.keys, planes.values, planes.mask, kind)
        self._add(ATTEND, source, target, sizes=sizes, numbers=(size**-0.5 if scale is None else scale, cap or 0.0))
        return target

    def activate(self, function: str, source: int, name: str, *, is_gated: bool) -> int:
        """An activation of `blip2.language.activations`; with a gate, that of the first half times the second half."""
        width = self.widths[source] // 2 if is_gated else self.widths[source]
        target = self.buffer(name, width)
        self._add(ACTIVATE, source, target, sizes=(FUNCTIONS[function], width, int(is_gated)))
        return target

    def _add(
        self, kind: int, source: int, target: int, weights: Sequence[Tensor | None] = (), sizes: Sequence[int] = (),
        numbers: tuple[float, float] = (0.0, 0.0),
    ) -> None:  # fmt: skip
        self._kept.extend(weight for weight in weights if weight is not None)
        pointers = [None if weight is None else weight.data_ptr() for weight in weights]
        operation = Operation(kind, source, target)
        operation.weights[: len(pointers)] = pointers
        operation.sizes[: len(sizes)] = sizes
        operation.numbers[:] = numbers
        self._operations.append(operation)

    def run(self, x_BW: Tensor, positions_B: Tensor, planes: Sequence[Tensor]) -> None:
        """Change ``x_BW`` in place. ``positions_B`` int64: the slots of the tokens."""
        library = kernels()
        assert library is not None and x_BW.is_contiguous() and positions_B.is_contiguous()
        if self._ready is None:
            widths = (ctypes.c_long * len(self.widths))(*self.widths)
            self._ready = (Operation * len(self._operations))(*self._operations), widths
        operations, widths = self._ready
        views = (Plane * len(planes))(*(Plane(*_plane(plane)) for plane in planes))
        run = Run(
            ctypes.addressof(operations), len(operations), ctypes.addressof(widths), len(widths),
            ctypes.addressof(views), positions_B.data_ptr(), x_BW.data_ptr(), TYPES[x_BW.dtype], len(x_BW),
        )  # fmt: skip
        threads = torch.get_num_threads()
        if self._num_bytes < BYTES_A_THREAD * self._num_products:
            threads = 1
        if library.blip2_run(ctypes.byref(run), threads):
            raise MemoryError("out of memory in a quantised language model")


def _plane(tensor: Tensor) -> tuple[int, ...]:
    rows, heads, slots, length = tensor.shape
    row, head, slot, _ = tensor.stride()
    return tensor.data_ptr(), row if rows > 1 else 0, head if heads > 1 else 0, slot, slots, length
