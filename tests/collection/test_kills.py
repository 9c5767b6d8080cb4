"""A run that is killed at any moment, and goes on, writes what one writes that nobody disturbed."""

import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

NUM_PICTURES, BATCH_SIZE, NUM_KILLS = 600, 8, 20
SCRIPT = Path(__file__).with_name("killed_run.py")


def picture(number):
    stream = BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256, 90)).save(stream, "PNG")
    return stream.getvalue()


def folder(place):
    for number in range(NUM_PICTURES):
        path = place / "photos" / f"{number % 7}_set" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return "photos", {"sidecar": ".txt", "output": "photos/metadata.jsonl"}


def shards(place):
    (place / "shards").mkdir()
    for shard in range(6):
        with tarfile.open(place / "shards" / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * 100, shard * 100 + 100):
                content = picture(number)
                member = tarfile.TarInfo(f"{number:03}.png")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return "shards/{00000..00005}.tar", {"output": "out/"}


def parquet(place):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"image": {"bytes": picture(number), "path": f"{number:03}.png"}} for number in range(NUM_PICTURES)]
    parquet.write_table(arrow.Table.from_pylist(rows), place / "pictures.parquet", row_group_size=100)
    return "pictures.parquet", {"output": "captions.parquet"}


def command(place, source, options, batch_size=BATCH_SIZE):
    return subprocess.Popen(
        [sys.executable, SCRIPT, "notes", source, json.dumps(options), str(batch_size)], cwd=place,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(place, source, options, batch_size=BATCH_SIZE):
    child = command(place, source, options, batch_size)
    assert child.wait() == 0, child.stderr.read().decode()


def files(place):
    """All that is there but journals and notes."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and not any(part.endswith(".blip2") for part in path.parts) and path.name != "notes"
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("make", [folder, shards, parquet])
def test_killed_at_random(tmp_path, make):
    places = tmp_path / "undisturbed", tmp_path / "killed"
    for place in places:
        place.mkdir()
        source, options = make(place)
    undisturbed, killed = places
    started = time.monotonic()
    finished(undisturbed, source, options, batch_size=1)  # the size of a batch makes no difference either
    whole_s = time.monotonic() - started

    chance = random.Random(13)
    kills = 0
    while kills < NUM_KILLS:
        child = command(killed, source, options)
        time.sleep(chance.uniform(0.2, 0.8) if chance.random() < 0.7 else chance.uniform(0, whole_s))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
    finished(killed, source, options)

    assert kills >= 2
    assert files(killed) == files(undisturbed)
    times = Counter((killed / "notes").read_text().split())
    assert len(times) == NUM_PICTURES
    assert times.total() - NUM_PICTURES <= kills * BATCH_SIZE  # what the model was at when it was killed
