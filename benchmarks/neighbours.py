"""Captions by the miniature while other programs keep the processors busy: the default threads beside one thread.

    python benchmarks/neighbours.py [--rounds 5] [--images 160]

Each sample is a process of its own that captions so many images, by `blip2.load().caption`, and is timed from the
first caption to the last. The two settings take turns, without neighbours and with one busy process a processor.
Prints the medians in seconds and how many times the better one's each is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
CAPTION = """
import sys, time
import blip2
model = blip2.load()
pictures = sys.argv[1:]
model.caption(pictures[:2])
started = time.perf_counter()
model.caption(pictures)
print(time.perf_counter() - started)
"""
SETTINGS = {"default": {}, "one thread": {"OMP_NUM_THREADS": "1"}}


def pictures(folder: Path, number: int) -> list[str]:
    names = ("picture", "cats", "flowers")
    sources = [Image.open(EXAMPLES / f"{name}.png").convert("RGB") for name in names]
    paths = [folder / f"{index:04}.png" for index in range(number)]
    for index, path in enumerate(paths):
        sources[index % 3].rotate(index // 3 % 4 * 90).save(path)
    return [str(path) for path in paths]


def sample(paths: list[str], setting: dict[str, str]) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", CAPTION, *paths]
    done = subprocess.run(command, env=environment | setting, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure(paths: list[str], rounds: int, num_neighbours: int) -> None:
    with ExitStack() as stack:
        for _ in range(num_neighbours):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        samples = [{name: sample(paths, setting) for name, setting in SETTINGS.items()} for _ in range(rounds)]
    medians = {name: statistics.median(each[name] for each in samples) for name in SETTINGS}
    best = min(medians.values())
    for name, seconds in medians.items():
        print(f"{num_neighbours} neighbours, {name:10} {seconds:6.2f} s, {seconds / best:.2f} x the better one")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures(Path(folder), options.images)
        for num_neighbours in (0, os.cpu_count() or 1):
            measure(paths, options.rounds, num_neighbours)


if __name__ == "__main__":
    main()
