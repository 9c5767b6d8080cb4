"""How fast the bundled miniature is: 300 images in one call, and one image from a cold start.

    python benchmarks/miniature.py

Prints images per second of `Pipeline.caption` over 300 files (decoding, encoding and 5 beams included), and the
wall time of a fresh `blip2 caption PICTURE` beside that of a fresh `import torch` in the same run: the difference is
ours. Medians of five, in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PICTURES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
NUM_PICTURES = 300


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - started


def main() -> None:
    whole, bare = [], []
    for _ in range(6):
        whole.append(seconds([sys.executable, "-m", "blip2", "caption", str(PICTURES[0])]))
        bare.append(seconds([sys.executable, "-c", "import torch"]))
    cold, torch_alone = statistics.median(whole[1:]), statistics.median(bare[1:])  # the first of each warms the disk
    print(f"one picture, cold start: {cold:.2f} s, of which importing torch alone {torch_alone:.2f} s")
    print(f"ours: {cold - torch_alone:.2f} s")

    import torch

    import blip2

    model = blip2.load()
    images = (PICTURES * NUM_PICTURES)[:NUM_PICTURES]
    model.caption(images[:16])
    for beams in (5, 1):
        started = time.perf_counter()
        model.caption(images, num_beams=beams, batch_size=64)
        taken = time.perf_counter() - started
        print(
            f"{NUM_PICTURES} pictures in one call, {beams} beam(s): {NUM_PICTURES / taken:.1f} images/s "
            f"({taken:.1f} s, {torch.get_num_threads()} threads)"
        )


if __name__ == "__main__":
    main()
