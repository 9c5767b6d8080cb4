"""Put what the two stages made into the package, in half precision: `python -m miniature.bundle WORK OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from blip2 import checkpoint


def bundle(work: Path, out: Path) -> None:
    """``work/stage2`` to ``out/generative`` and ``work/stage1`` to ``out/matching``, in float16."""
    for made, name in (("stage2", "generative"), ("stage1", "matching")):
        folder = work / made
        model = checkpoint.load(folder)
        checkpoint.save(
            model,
            out / name,
            tokenizer=folder / "tokenizer.json",
            dtype=torch.float16,
            settings=checkpoint.image_settings(folder),
        )
        size = (out / name / "model.safetensors").stat().st_size
        print(f"{out / name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    bundle(Path(sys.argv[1]), Path(sys.argv[2]))
