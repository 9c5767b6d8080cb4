"""What one of several processes does in the tests: features of a recipe's rows. One may kill itself after some batches.

    python -m tests.train.keeping recipe.toml FOLDER BATCH_SIZE RANK_THAT_DIES BATCHES_IT_MAKES

The rank that LATE names looks a second later than the others at what there is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from blip2 import checkpoint
from blip2.data import RowImages, frozen_features
from blip2.data.kept import Kept
from blip2.train.check import gather
from blip2.train.group import joined
from blip2.train.recipes import load_recipe

if __name__ == "__main__":
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    size, dies, after = map(int, sys.argv[3:])
    recipe = load_recipe(path)
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as group:
        with group.in_turn("gathered"):
            materials = gather(recipe, path)
        if os.environ.get("LATE") == str(group.rank):
            look = Kept.missing
            Kept.missing = lambda kept: time.sleep(1) or look(kept)
        pictures = RowImages(materials.train_rows, **asdict(materials.settings), threads=1, is_distinct=True)
        made = 0

        def report(done, total):
            global made
            made += 1
            if group.rank == dies and made == after:
                os.kill(os.getpid(), signal.SIGKILL)

        vision = checkpoint.load(materials.start).vision
        frozen_features(vision, pictures, folder, "rows", batch_size=size, workers=group, report=report)
        (folder / f"made{group.rank}").write_text(str(made))
