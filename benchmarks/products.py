"""How fast the linear layers of a token read their weights, beside the speed at which memory is read.

    python benchmarks/products.py [--threads 2] [--rounds 9] [--rows 1]

The shapes are those of Flan-T5-XL's decoder. Sides: the kernels for int8 and int4, by each kind of code that this
processor has, and float32, by `F.linear` and in oneDNN's order. Every side goes through several copies of its weights,
256 MB or more, so that no cache holds them; a side's figure is GB of weights (codes and scales) per second. All sides
and a sum of 1 GB are timed in turn, round by round. Prints the medians, and each as a share of the sum's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import nn

from blip2 import native
from blip2.linear import Linear
from blip2.quantized import BITS, QuantizedLinear

SHAPES = {"queries, keys, values": (6144, 2048), "square": (2048, 2048), "gate and up": (10240, 2048),
          "down": (2048, 5120), "output": (32128, 2048)}  # fmt: skip
GIGABYTE, OUT_OF_CACHE = 2**30, 2**28
BEST = len(native.LEVELS) - 1
Side = Callable[[], float]


def per_second(num_bytes: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return num_bytes / (time.perf_counter() - started)


def side(build: Callable[[], nn.Module], x: torch.Tensor, num_bytes: int, level: int = BEST) -> Side:
    """Bytes per second, by the kernels of a level; a layer's weights are so many bytes."""
    layers = [build() for _ in range(-(-OUT_OF_CACHE // num_bytes))]
    for layer in layers:  # the first product puts the weights in order
        layer(x)
    library = native.kernels()

    def once() -> float:
        if library is not None:
            library.blip2_prepare(level)
        return per_second(num_bytes * len(layers), lambda: [layer(x) for layer in layers])

    return once


def sides(outputs: int, inputs: int, rows: int) -> dict[str, Side]:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)

    def quantized(bits: int) -> QuantizedLinear:
        layer = QuantizedLinear(inputs, outputs, bits=bits, group_size=64, has_bias=False)
        layer.fill(weight, torch.device("cpu"))
        return layer

    found = {
        "float32": side(partial(nn.Linear, inputs, outputs, bias=False), x, weight.nbytes),
        "float32, packed": side(partial(Linear, inputs, outputs, bias=False), x, weight.nbytes),
    }
    library = native.kernels()
    if library is None:
        return found
    levels = [level for level in range(BEST + 1) if library.blip2_prepare(level) == level]
    for level, bits in product(levels, BITS):
        layer = quantized(bits)
        num_bytes = layer.codes.nbytes + layer.scales.nbytes
        found[f"int{bits}, {native.LEVELS[level]}"] = side(partial(quantized, bits), x, num_bytes, level)
    return found


@torch.inference_mode()
def measure(rows: int, rounds: int) -> None:
    block = torch.ones(GIGABYTE // 4)
    for what, (outputs, inputs) in SHAPES.items():
        in_turn = {"memory": lambda: per_second(GIGABYTE, block.sum), **sides(outputs, inputs, rows)}
        samples = [{name: once() for name, once in in_turn.items()} for _ in range(rounds)]
        rates = {name: statistics.median(sample[name] for sample in samples) for name in in_turn}
        memory = rates.pop("memory")
        print(f"{what}, {outputs} x {inputs}, {rows} rows: memory is read at {memory / 1e9:.1f} GB/s")
        for name, rate in rates.items():
            print(f"    {name:16} {rate / 1e9:6.1f} GB/s  {100 * rate / memory:4.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure(options.rows, options.rounds)


if __name__ == "__main__":
    main()
