"""Number of CPU threads, depending on the size of the model.

Threads that share an operation wait for each other at its end. For a small model that costs more than the second thread
saves, and several times as much if another program uses one of the processors.
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
"""Weights for each thread: with a quarter of that, two threads are no faster than one on an idle machine."""


def num_useful(model: Any) -> int:
    """The number of threads for a model's size, at least 1; no limit if it is not an ``nn.Module``."""
    if not isinstance(model, torch.nn.Module):
        return sys.maxsize
    num_weights = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
    return 1 + num_weights // WEIGHTS_A_THREAD


def fitting(model: Any) -> AbstractContextManager[None]:
    """Inside, as many threads as suit the model's size; see `at_most`."""
    return at_most(num_useful(model))


@contextmanager
def at_most(number: int) -> Iterator[None]:
    """Inside, torch uses at most this many threads; a number set by OMP_NUM_THREADS is kept."""
    before = torch.get_num_threads()
    if number >= before or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
