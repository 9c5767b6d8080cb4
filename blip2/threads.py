"""How many threads a model computes with on a CPU: as many as its size is worth.

Threads that share an operation wait for one another at its end. For a small model that takes longer than the second
thread saves, and several times as long where another program has one of the processors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch

WEIGHTS_A_THREAD = 2**25
"""Weights that are worth a thread: with a fourth of that, two threads are no faster than one on an idle machine."""


def worth(model: Any) -> int:
    """How many threads a model's size is worth, at least 1; no limit for what is no ``nn.Module``."""
    if not isinstance(model, torch.nn.Module):
        return sys.maxsize
    num_weights = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
    return 1 + num_weights // WEIGHTS_A_THREAD


def fitting(model: Any) -> AbstractContextManager[None]:
    """Within, as many threads as the model's size is worth; see `at_most`."""
    return at_most(worth(model))


@contextmanager
def at_most(number: int) -> Iterator[None]:
    """Within, torch uses no more threads than that; a number that the user chose by OMP_NUM_THREADS stays."""
    before = torch.get_num_threads()
    if number >= before or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
