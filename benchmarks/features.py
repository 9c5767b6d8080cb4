"""What kept features cost in bytes and in what is learnt from them, by how they are stored.

    python -m miniature.world --split test --count 200 --seed 1 --out DIR
    python benchmarks/features.py DIR

Of the bundled models on these images: bytes of an image; the relative error of an image's features after the image
encoder's last norm, its mean and its largest (the norm of the difference by the norm of the whole); and the losses of
both stages, all by the same draws, without features on the disk and with them.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from blip2 import checkpoint
from blip2.data import RowImages, frozen_features, read_rows
from blip2.train.check import gather
from blip2.train.prepare import prepare
from blip2.train.recipes import load_recipe
from blip2.train.start import build

STARTS = {1: "miniature-itm", 2: "miniature"}
RECIPE = """
stage = {stage}
start = "{start}"
out = "out"
precision = "fp32"
[data]
rows = "{rows}"
{features}
[optim]
steps = 1
batch_size = 50
[evaluation]
rows = "{rows}"
"""


def losses(stage: int, rows: Path, folder: Path, dtype: str | None) -> dict[str, float]:
    """Of all rows, by the means of training."""
    features = "" if dtype is None else f'features = "features"\nfeatures_dtype = "{dtype}"'
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(stage=stage, start=STARTS[stage], rows=rows.absolute(), features=features))
    recipe = load_recipe(path)
    materials = gather(recipe, path)
    model = build(recipe, path, materials, device=torch.device("cpu"), dtype=torch.float32)
    task = prepare(model, materials, recipe, lambda progress: None)
    task.open_features()
    assert task.evaluate is not None
    with torch.no_grad():
        found = task.evaluate()
    return {name: found[name] for name in ("itc", "itm", "lm") if name in found}


@torch.no_grad()
def errors(rows: Path, folder: Path, dtype: str) -> tuple[int, float, float]:
    """Bytes of an image, and the mean and the largest relative error of an image's features."""
    start = checkpoint.resolve(STARTS[1])
    model = checkpoint.load(start, dtype=torch.float32)
    settings = asdict(checkpoint.image_settings(start, model.config))
    shown = RowImages(read_rows([rows]), **settings)
    file = frozen_features(model.vision, shown, folder / "features", "errors", dtype=dtype)  # type: ignore[arg-type]
    found = []
    for number in range(len(shown)):
        exact_1PD = model.vision.post_norm(model.vision.features(shown.pixels([number])))
        kept_1PD = model.vision.post_norm(file.read(np.array([number])).float())
        found.append(float((kept_1PD - exact_1PD).norm() / exact_1PD.norm()))
    [path] = (path for path in (folder / "features").glob("errors*.bin") if (dtype in path.stem) == (dtype != "fp16"))
    return path.stat().st_size // len(shown), sum(found) / len(found), max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that miniature.world has written")
    rows = parser.parse_args().data / "rows.jsonl"
    torch.set_num_threads(1)
    print("| features_dtype | bytes a picture | error, mean | error, largest | ITC | ITM | ITG | stage 2 |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for dtype in (None, "fp16", "int8", "fp8"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            told = [*losses(1, rows, folder, dtype).values(), *losses(2, rows, folder, dtype).values()]
            figures = " | ".join(f"{value:.4f}" for value in told)
            if dtype is None:
                print(f"| none kept | | | | {figures} |", flush=True)
                continue
            size, mean, largest = errors(rows, folder / dtype, dtype)
            print(f"| {dtype} | {size:,} | {100 * mean:.3f} % | {100 * largest:.3f} % | {figures} |", flush=True)


if __name__ == "__main__":
    main()
