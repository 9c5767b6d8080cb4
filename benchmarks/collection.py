"""A folder of images to sidecars: what it costs beside the model alone, and beside the obvious loops.

    python benchmarks/collection.py [MODEL] [--number 2000] [--device cuda] [--dtype bfloat16] [--rounds 3] [--json OUT]

Without MODEL (a folder): the bundled miniature. Images of 2 megapixels are drawn as JPEG files. Sides, in turn:

    decoded        `each_caption` over images that are decoded already and in memory: the model's own speed
    files          `caption_collection` of the folder into sidecars
    one by one     `transformers`: open, process, generate, decode, write a sidecar
    loader         `transformers`, a batch at a time, files read and processed by a DataLoader's workers

All greedy, with as many tokens for each caption; ``--sides`` chooses some. Prints the median images a second.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = (1632, 1224)
NUM_DECODED = 64
"""So many decoded images are in memory, and are gone through again and again."""
LOADER_WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))


def draw(path: str) -> None:
    """About what a camera writes: smooth shapes and some grain, 0.5 MB."""
    random = np.random.default_rng(int(Path(path).stem))
    shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), "uint8")).resize(SIZE, Image.Resampling.BICUBIC)
    grain = random.integers(-6, 7, (SIZE[1], SIZE[0], 1), "int16")
    Image.fromarray((np.asarray(shapes, "int16") + grain).clip(0, 255).astype("uint8")).save(path, quality=88)


def drawn(folder: Path, number: int) -> list[str]:
    paths = [str(folder / f"{place:06}.jpg") for place in range(number)]
    with ProcessPoolExecutor() as processes:
        list(processes.map(draw, paths, chunksize=16))
    return paths


class Ours:
    def __init__(self, model: str | None, options: argparse.Namespace) -> None:
        self.blip2 = importlib.import_module("blip2")
        self.pipeline = self.blip2.load(model or "miniature", device=options.device, dtype=options.dtype)
        self.options: dict[str, Any] = {
            "num_beams": 1, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens,
            "batch_size": options.batch_size,
        }  # fmt: skip

    def decoded(self, paths: list[str]) -> int:
        pictures = [Image.open(path).convert("RGB") for path in paths[:NUM_DECODED]]
        started = time.perf_counter()
        found = self.pipeline.each_caption(list(islice(cycle(pictures), len(paths))), **self.options)
        number = sum(1 for _ in found)
        self.took_s = time.perf_counter() - started
        return number

    def files(self, paths: list[str]) -> int:
        started = time.perf_counter()
        summary = self.blip2.caption_collection(
            Path(paths[0]).parent, model=self.pipeline, sidecar=".txt", restart=True, if_exists="overwrite",
            limit=len(paths),
            **self.options,
        )  # fmt: skip
        self.took_s = time.perf_counter() - started
        return int(summary.done)


class Transformers:
    """The loops that its documentation and the forums show."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        transformers = importlib.import_module("transformers")
        self.dtype, self.device = getattr(torch, options.dtype), options.device
        kind = transformers.Blip2ForConditionalGeneration
        self.model = kind.from_pretrained(model, dtype=self.dtype, local_files_only=True).eval().to(self.device)
        self.processor = transformers.AutoProcessor.from_pretrained(model, local_files_only=True)
        self.options = {"num_beams": 1, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
        self.batch_size = options.batch_size

    @torch.inference_mode()
    def _caption(self, inputs: Any, paths: list[str]) -> int:
        ids = self.model.generate(**inputs.to(self.device, self.dtype), **self.options)
        for path, text in zip(paths, self.processor.batch_decode(ids, skip_special_tokens=True), strict=True):
            Path(path).with_suffix(".txt").write_text(text.strip() + "\n", encoding="utf-8")
        return len(paths)

    def _process(self, paths: list[str]) -> Any:
        pictures = [Image.open(path).convert("RGB") for path in paths]
        return self.processor(images=pictures, text=[""] * len(paths), return_tensors="pt")

    def one_by_one(self, paths: list[str]) -> int:
        started = time.perf_counter()
        number = sum(self._caption(self._process([path]), [path]) for path in paths)
        self.took_s = time.perf_counter() - started
        return number

    def loader(self, paths: list[str]) -> int:
        started = time.perf_counter()
        batches = torch.utils.data.DataLoader(
            paths,  # type: ignore[arg-type]
            batch_size=self.batch_size, num_workers=LOADER_WORKERS, collate_fn=lambda some: (self._process(some), some),
        )  # fmt: skip
        number = sum(self._caption(inputs, some) for inputs, some in batches)
        self.took_s = time.perf_counter() - started
        return number


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder; without one, the bundled miniature")
    parser.add_argument("--number", type=int, default=2000, help="of pictures")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20, help="of each caption")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="decoded,files,one by one,loader")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = options.sides.split(",")
    folder = Path(tempfile.mkdtemp(prefix="blip2-collection-"))
    try:
        paths = drawn(folder, options.number)
        ours = Ours(options.model, options)
        sides: dict[str, tuple[Any, Callable[[list[str]], int]]] = {
            "decoded": (ours, ours.decoded), "files": (ours, ours.files)
        }  # fmt: skip
        if {"one by one", "loader"} & set(wanted):
            name = options.model or str(importlib.import_module("blip2.checkpoint").BUNDLED["miniature"])
            theirs = Transformers(name, options)
            sides |= {"one by one": (theirs, theirs.one_by_one), "loader": (theirs, theirs.loader)}
        rates: dict[str, list[float]] = {side: [] for side in wanted}
        for side in wanted:  # what is loaded once, is
            sides[side][1](paths[:2] if side == "one by one" else paths[: options.batch_size])
        for _ in range(options.rounds):
            for side in wanted:
                some = paths[: max(len(paths) // 10, 1)] if side == "one by one" else paths
                number = sides[side][1](some)
                assert number == len(some), (side, number)
                rates[side].append(number / sides[side][0].took_s)
    finally:
        shutil.rmtree(folder)
    base = statistics.median(rates[wanted[0]])
    for side, found in rates.items():
        middle = statistics.median(found)
        print(f"{side:12} {middle:8.2f} pictures/s ({min(found):.2f} to {max(found):.2f})  {middle / base:5.0%}")
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": ""}, "rates": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
