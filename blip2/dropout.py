"""Dropout that follows from a row's number: how a batch is divided, among processes or in time, changes nothing.

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

_ROWS: ContextVar[_Rows | None] = ContextVar("rows of dropout", default=None)


@contextmanager
def dropout_by_rows(key: Sequence[int], row_B: Tensor) -> Iterator[None]:
    """Within, `drop` draws for each row of a batch by the row's number ``row_B`` int64[B] and ``key``.

    The masks of one number are the same in any batch, if as many calls came before and rows have the same shape: who
    computes a batch in parts pads their texts to the same width. ``key`` names the seed, the step, the pass.
    """
    with _within(_Rows(key, row_B)):
        yield


def replayed_dropout() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What `torch.utils.checkpoint` asks for: within the second, what is computed again, perhaps by another thread,
    draws what was drawn within the first."""
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
    """Dropout of ``float[B, ...]``: with torch's own random numbers, or within `dropout_by_rows` with the rows'. What
    has another number of rows (a T5 reads each text of a picture in one of its own) has torch's."""
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
        self._row_B = _mixed((row_B + 1).to(torch.int32) * -1640531527)  # 2^32 / golden ratio: neighbours lie far apart

    def draw(self, shape: torch.Size, probability: float) -> Tensor:
        """Which values stay: bool of this shape, whose first axis is the rows."""
        # One draw for all rows, of which each makes its own by its number: a draw for each would be a kernel for each.
        self._generator.manual_seed(random.Random(f"{self._key} {self._count}").getrandbits(62))
        self._count += 1
        common_X = torch.empty(shape[1:], dtype=torch.int32, device=self._row_B.device)
        common_X.random_(-(2**31), 2**31, generator=self._generator)
        mixed_BX = _mixed(common_X ^ self._row_B.view(-1, *(1 for _ in shape[1:])))
        return mixed_BX >= int(probability * 2**32) - 2**31


def _mixed(x: Tensor) -> Tensor:
    """Each bit of an int32 depends on all bits of the one before: two rounds of multiplying and folding. In place."""
    for factor in (0x7FEB352D, -0x7B935975):
        x ^= (x >> 16) & 0xFFFF
        x *= factor
    return x
