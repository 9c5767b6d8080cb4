"""What this machine can do at most: how fast memory is read, and how fast matrices are multiplied.

    python benchmarks/limits.py [--threads 2]

Prints GB/s of reading (the best of several ways to sum 1 GB, the best of five each) and 10^9 operations per second
(a multiplication and an addition are two) of square matrix products in bfloat16, float32 and int8. The speed of
decoding one row cannot pass the first, that of reading an image cannot pass the second.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch

GIGABYTE = 2**30
SIDE = 2048


def best_seconds(work: Callable[[], object], rounds: int = 5, enough_s: float = 10) -> float:
    taken: list[float] = []
    while len(taken) < rounds and sum(taken) < enough_s:  # without instructions for it, a product takes a minute
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def memory_read() -> float:
    """Bytes per second."""
    block = torch.ones(GIGABYTE, dtype=torch.uint8)
    numbers, wide = block.view(torch.float32), block.view(torch.int64)
    ways = (numbers.sum, wide.sum, numbers.amax)
    return GIGABYTE / min(best_seconds(way) for way in ways)


def products() -> dict[str, float]:
    """Operations per second by precision; absent where torch cannot."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        left, right = (torch.randint(-8, 8, (SIDE, SIDE)).to(dtype) for _ in range(2))
        multiply = partial(torch._int_mm if dtype == torch.int8 else torch.mm, left, right)
        try:
            found[str(dtype).removeprefix("torch.")] = 2 * SIDE**3 / best_seconds(multiply)
        except (RuntimeError, NotImplementedError):
            continue
    return found


def measure() -> dict[str, float]:
    return {"memory": memory_read(), **products()}


def show(limits: dict[str, float]) -> None:
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.items() if name != "memory")
    print(f"memory is read at {limits['memory'] / 1e9:.1f} GB/s; matrix products, 10^9 operations/s: {rates}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    show(measure())


if __name__ == "__main__":
    main()
