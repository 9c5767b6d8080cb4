"""This package beside `transformers` on a GPU, on one checkpoint of a published shape, both by the drop-in's calls.

    python benchmarks/random_checkpoint.py opt-2.7b /tmp/opt-2.7b
    python benchmarks/gpu.py /tmp/opt-2.7b [--dtype float16] [--rounds 5] [--json OUT]

The sides take turns on the same inputs: one image greedily, 16 images greedily, 4 images with 5 beams; 64 new
tokens each. Prints for each the median milliseconds per step, the most memory, and whether the ids are the same.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
NUM_TOKENS = 64
WORK = {"1 picture": (1, 1), "16 pictures": (16, 1), "4 pictures, 5 beams": (4, 5)}


def timed(model: Any, inputs: dict[str, Any], num_beams: int) -> tuple[float, torch.Tensor]:
    """Seconds, and the ids."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, num_beams=num_beams)
    torch.cuda.synchronize()
    return time.perf_counter() - started, ids.cpu()


def measure(folder: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    models, load_s = {}, {}
    for name in ("transformers", "blip2"):
        started = time.perf_counter()
        kind = importlib.import_module(name).Blip2ForConditionalGeneration
        models[name] = kind.from_pretrained(folder, dtype=dtype, device_map={"": 0}).eval()
        torch.cuda.synchronize()
        load_s[name] = time.perf_counter() - started
    processor = importlib.import_module("blip2").Blip2Processor.from_pretrained(folder)
    picture = Image.open(EXAMPLES / "picture.png").convert("RGB")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "dtype": str(dtype), "load_s": load_s}
    for what, (number, num_beams) in WORK.items():
        pictures = [picture.rotate(20 * index) for index in range(number)]
        inputs = processor(pictures, ["a photo of"] * number, return_tensors="pt").to("cuda:0", dtype)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        ids, memory = {}, {}
        for turn in range(rounds + 1):
            for name, model in models.items():
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                taken, ids[name] = timed(model, inputs, num_beams)
                memory[name] = torch.cuda.max_memory_allocated() - before
                if turn:  # the first warms up
                    seconds[name].append(taken)
        medians = {name: 1e3 * statistics.median(taken) / NUM_TOKENS for name, taken in seconds.items()}
        same = float((ids["transformers"] == ids["blip2"]).float().mean())
        report[what] = {"ms_per_step": medians, "bytes_beside_weights": memory, "same_ids": same}
        print(
            f"{what}: "
            + "; ".join(f"{name} {medians[name]:.2f} ms a step, {memory[name] / 1e9:.2f} GB" for name in models)
            + f"; {medians['transformers'] / medians['blip2']:.2f} x; {same:.1%} of the ids are the same"
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    if not torch.cuda.is_available() or options.folder is None:
        print("nothing to measure: " + ("name a checkpoint" if torch.cuda.is_available() else "there is no GPU here"))
        return
    report = measure(options.folder, getattr(torch, options.dtype), options.rounds)
    print(json.dumps(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
