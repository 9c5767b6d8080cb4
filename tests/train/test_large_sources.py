"""A hundred thousand rows in shards: what it takes to begin, to go on, and to read them."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import blip2

ROWS, SHARDS, PICTURES = 100_000, 10, 500
MODEL = Path(blip2.__file__).parent / "miniature" / "matching"
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
started = time.perf_counter()
from blip2 import checkpoint, train
from blip2.data import BadImages
from blip2.train.check import gather
from blip2.train.recipes import load_recipe
from blip2.train.reading import RowSet
imported = time.perf_counter()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

path, told = Path(sys.argv[1]), []
recipe = load_recipe(path)
materials = gather(recipe, path, told.append)
model = checkpoint.load(materials.start)
rows = RowSet(materials.train_rows, [], model.vision, materials.settings, recipe, BadImages("stop"))
first = int(sys.argv[2])
rows.read(rows.draws(first))
ready, before = time.perf_counter(), peak()
for step in range(first + 1, first + 101):
    rows.read(rows.draws(step))
read = time.perf_counter()
after = peak()
rates = []
if first == 0:
    train.run(path, report=lambda progress: progress.images_per_s and rates.append(progress.images_per_s))
rows_per_s = 100 * recipe.optim.batch_size / (read - ready)
print(json.dumps({"told": told, "ready_s": ready - imported, "rows_per_s": rows_per_s,
                  "before_mb": before, "after_mb": after, "train_per_s": rates[-1] if rates else None}))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        file = io.BytesIO()
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((224, 224), Image.Resampling.BICUBIC).save(file, "JPEG")
        pictures.append(file.getvalue())
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for number in range(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS):
                told = json.dumps({"caption": f"a red car {number}", "key": f"{number:09}"}).encode()
                members = {"jpg": pictures[number % PICTURES], "json": told, "txt": f"a red car {number}".encode()}
                for name, content in members.items():
                    info = tarfile.TarInfo(f"{number:09}.{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.slow
def test_a_hundred_thousand_rows(shards):
    """Found once; a run that goes on in its middle looks at none again, and memory does not grow with what was read."""
    recipe = shards / "recipe.toml"
    recipe.write_text(
        f"""
        stage = 1
        start = "{MODEL}"
        out = "out"
        precision = "fp32"
        threads = 1
        log_every = 4
        data = "{{00000..{SHARDS - 1:05}}}.tar"
        [optim]
        steps = 12
        batch_size = 32
        """
    )
    found = []
    for first in (0, 1_000_000, 1_000_000):
        command = [sys.executable, "-c", PROGRAM, str(recipe), str(first)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    print(f"\n{ROWS:,} rows, {size / 1e9:.2f} GB in {SHARDS} shards")
    for name, what in zip(("first", "goes on", "again"), found, strict=True):
        print(name, {key: round(value, 1) for key, value in what.items() if isinstance(value, float)})
    begun, gone_on, again = found
    assert begun["told"][0].endswith(f"{ROWS:,} so far") and begun["told"][1].endswith(f": {ROWS:,} rows")
    assert gone_on["told"] == again["told"] == []
    for what in found:
        assert what["after_mb"] - what["before_mb"] < 50
    kept = sum(path.stat().st_size for path in (shards / "out" / "training" / "rows").iterdir())
    assert kept < 40 * ROWS
