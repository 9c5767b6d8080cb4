"""How long a search takes beside reading the vectors once, and a run with nothing new.

    python benchmarks/index.py [--number 100000] [--images 20000] [--threads 2] [--folder /tmp]

Random unit vectors in half precision, 32 of 256 numbers an image as in the published models (100,000 images are
1.64 GB). Both sides of one run, in turn: the search for the ten nearest of a random text, and the fastest of several
ways to sum all vectors where they are, in memory. The search is checked against float32 arithmetic. Memory is the most
that a process had resident that opened the index and searched it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from blip2.disk import Stamp, stamp_of
from blip2.index import Index
from blip2.index.duplicates import groups
from blip2.index.file import IndexedImage, Origin, crc32_of, write
from blip2.index.search import nearest

NUM_QUERIES, WIDTH = 32, 256
ROUNDS = 15
NOTHING = Origin("search", "miniature-itm", "none")


def unit_vectors(number: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        yield F.normalize(torch.randn(NUM_QUERIES, WIDTH, generator=generator), dim=-1).half()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_random(path: Path, paths: list[str]) -> None:
    """An index of random vectors. What is in the files does not matter, but they may exist."""
    # Written twice over, since the checksums of the vectors stand before them: never are all of them in memory.
    pictures = [
        IndexedImage(name, stamp_of(name) or Stamp(1, 1), crc32_of(vectors_QD))
        for name, vectors_QD in zip(paths, unit_vectors(len(paths)), strict=True)
    ]
    write(path, NOTHING, pictures, (NUM_QUERIES, WIDTH), unit_vectors(len(paths)))


def searching(path: Path) -> None:
    """In a process of its own, so that its memory is that of a search."""
    query = F.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), dim=0)
    before = peak_bytes()
    started = time.perf_counter()
    index = Index.open(path)
    opened = time.perf_counter() - started
    hits = []
    rows = index._stored.rows
    first = seconds(lambda: hits.extend(nearest(rows, query, 10)[1]))
    names = seconds(lambda: [index._path(row) for row in hits])
    size = index.vectors.nbytes
    print(f"{len(index):,} images, {size / 1e9:.2f} GB of vectors, {torch.get_num_threads()} threads")
    print(f"open {opened * 1e3:.0f} ms, first search (compares every row with its checksum) {first * 1e3:.0f} ms, "
          f"the paths of ten {names * 1e3:.1f} ms")  # fmt: skip
    peak = peak_bytes()
    wide = index.vectors.view(torch.int64)
    narrow = index.vectors.view(torch.float32)
    ways = {"sum of int64": wide.sum, "maximum of int64": wide.amax, "maximum of float32": narrow.amax}
    searches, readings = [], {name: [] for name in ways}
    for _ in range(ROUNDS):
        searches.append(seconds(lambda: nearest(rows, query, 10)))
        for name, way in ways.items():
            readings[name].append(seconds(way))
    reading = min(readings, key=lambda name: statistics.median(readings[name]))
    for name, taken in ((f"reading once ({reading})", readings[reading]), ("search", searches)):
        middle = statistics.median(taken)
        print(f"{name}: median {middle * 1e3:.0f} ms ({size / middle / 1e9:.1f} GB/s), best {min(taken) * 1e3:.0f} ms")
    ratio = statistics.median(searches) / statistics.median(readings[reading])
    print(f"search / reading: {ratio:.2f} by medians, {min(searches) / min(readings[reading]):.2f} by the best")
    print(f"most memory resident: {peak / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before opening")
    exact = torch.cat([(some.float() @ query).amax(dim=1) for some in index.vectors.split(1000)])
    agrees = hits == exact.sort(descending=True, stable=True).indices[:10].tolist()
    print(f"the ten nearest are those of float32 arithmetic: {'yes' if agrees else 'NO'}")


def nothing_new(folder: Path, number: int) -> None:
    """The command on a folder whose images are all known."""
    photos = folder / "photos"
    photos.mkdir()
    paths = sorted(str(photos / f"{row:06}.jpg") for row in range(number))
    for path in paths:
        Path(path).write_bytes(b"never opened")
    write_random(folder / "known.index", paths)
    command = [sys.executable, "-m", "blip2", "index", str(photos), "-o", str(folder / "known.index")]
    taken = [seconds(lambda: subprocess.run(command, check=True)) for _ in range(3)]
    print(f"blip2 index of {number:,} known images: {statistics.median(taken):.1f} s, best {min(taken):.1f} s")
    empty = [sys.executable, "-c", "import blip2.index"]
    print(f"of which importing: {min(seconds(lambda: subprocess.run(empty, check=True)) for _ in range(3)):.1f} s")


def near_duplicates(path: Path, number: int) -> None:
    vectors_NL = Index.open(path).vectors[:number].flatten(1).clone()
    vectors_NL[7] = vectors_NL[3]
    found = []
    taken = seconds(lambda: found.extend(groups(vectors_NL, 0.95)))
    print(
        f"near duplicates among {number:,} of them: {taken:.1f} s, found {[rows for _, rows in found]} (planted [3, 7])"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help="where the index is made, for a while")
    parser.add_argument("--searching", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.searching:
        searching(options.searching)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        path = folder / "random.index"
        taken = seconds(lambda: write_random(path, [f"/photos/{row:07}.jpg" for row in range(options.number)]))
        print(f"made an index of random vectors in {taken:.0f} s", flush=True)
        arguments = ["--searching", str(path), "--threads", str(options.threads)]
        subprocess.run([sys.executable, __file__, *arguments], check=True)
        near_duplicates(path, min(options.number, 20_000))
        nothing_new(folder, options.images)


if __name__ == "__main__":
    main()
