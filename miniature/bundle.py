"""Put what the two stages made into the package, in half precision:

    python -m miniature.bundle WORK OUT                  (the first round: make.sh)
    python -m miniature.bundle WORK OUT --round again    (the second: again.sh)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from blip2 import checkpoint

ROUNDS = {"first": {"stage1": "matching", "stage2": "generative"}, "again": {"again2": "generative"}}
"""The trained folders of ``WORK``, and their names in the package."""


def bundle(work: Path, out: Path, made: str = "first") -> None:
    """Write the checkpoints of a round to ``out``, in float16."""
    for folder, name in ROUNDS[made].items():
        source = work / folder
        checkpoint.save(
            checkpoint.load(source),
            out / name,
            tokenizer=source / "tokenizer.json",
            dtype=torch.float16,
            settings=checkpoint.image_settings(source),
        )
        size = (out / name / "model.safetensors").stat().st_size
        print(f"{out / name}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--round", choices=ROUNDS, default="first")
    options = parser.parse_args()
    bundle(options.work, options.out, options.round)


if __name__ == "__main__":
    main()
