"""Dropout that depends on the row number, so that the division of a batch among processes or parts does not matter.

B rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS: ContextVar[_Rows | None] = ContextVar("dropout_rows", default=None)


@contextmanager
def dropout_by_rows(key: Sequence[int], row_B: Tensor) -> Iterator[None]:
    """Inside this context, `drop` uses random numbers that follow from the row numbers ``row_B`` int64[B] and ``key``.

    A row has the same masks in any batch, if the same number of calls came before and rows have the same shape; so
    texts of parts have to be padded to the same width. ``key`` names the seed, the step and the pass.
    """
    with _within(_Rows(key, row_B)):
        yield


def replayed_dropout() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: inside the second context, recomputation, perhaps in another thread, repeats the
    random numbers of the first."""
    rows = _ROWS.get()
    return nullcontext(), nullcontext() if rows is None else _within(copy(rows))


@contextmanager
def _within(rows: _Rows) -> Iterator[None]:
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def is_by_rows() -> bool:
    return _ROWS.get() is not None


def drop(x_BX: Tensor, probability: float, training: bool = True) -> Tensor:
    """Dropout of ``float[B, ...]`` with torch's random numbers, or inside `dropout_by_rows` with those of the rows.
    Tensors with another number of rows (a T5 reads each text in a row of its own) use torch's."""
    rows = _ROWS.get()
    if rows is None or not training or not probability or len(x_BX) != rows.count:
        return F.dropout(x_BX, probability, training)
    kept_BX = rows.draw(x_BX.shape, probability)
    return x_BX * kept_BX.to(x_BX.dtype).mul_(1 / (1 - probability))


class _Rows:
    def __init__(self, key: Sequence[int], row_B: Tensor) -> None:
        self.count = len(row_B)
        self._key, self._count = " ".join(map(str, key)), 0
        self._generator = torch.Generator(row_B.device)
        self._row_B = _mixed((row_B + 1).to(torch.int32) * -1640531527)  # 2^32 / golden ratio: separates neighbours

    def draw(self, shape: torch.Size, probability: float) -> Tensor:
        """The mask of kept values: bool of this shape, whose first axis is the rows."""
        # One call draws for all rows, and the row number is mixed in: a call for each row would be a kernel for each.
        self._generator.manual_seed(random.Random(f"{self._key} {self._count}").getrandbits(62))
        self._count += 1
        common_X = torch.empty(shape[1:], dtype=torch.int32, device=self._row_B.device)
        common_X.random_(-(2**31), 2**31, generator=self._generator)
        mixed_BX = _mixed(common_X ^ self._row_B.view(-1, *(1 for _ in shape[1:])))
        return mixed_BX >= int(probability * 2**32) - 2**31


def _mixed(x: Tensor) -> Tensor:
    """Mixes the bits of an int32 in place, so that each depends on all: two rounds of multiplication and shifts."""
    for factor in (0x7FEB352D, -0x7B935975):
        x ^= (x >> 16) & 0xFFFF
        x *= factor
    return x
