"""A run that is killed at any moment, and goes on, writes what one writes that nobody disturbed.

At its full size, of which it prints the figures (ten minutes for ``miniature``, a few for the others):

    BLIP2_KILLS_PICTURES=10000 BLIP2_KILLS_MODEL=miniature pytest -s -m slow tests/collection/test_kills.py -k folder
"""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.collection import test_engines as engines

NUM_PICTURES = int(os.environ.get("BLIP2_KILLS_PICTURES", "600"))
MODEL = os.environ.get("BLIP2_KILLS_MODEL", "names")
"""Of `killed_run`."""
BATCH_SIZE, NUM_KILLS = 8, 20
SHARDS = 6
SCRIPT = Path(__file__).with_name("killed_run.py")


def picture(number):
    """Another one for each number."""
    stream = BytesIO()
    image = Image.new("RGB", (48, 36), (number % 256, number // 256, 90))
    image.paste((255, number * 37 % 256, number * 11 % 256), (number % 24, number % 18, number % 24 + 20, 30))
    image.save(stream, "PNG")
    return stream.getvalue()


def folder(place):
    for number in range(NUM_PICTURES):
        path = place / "photos" / f"{number % 7}_set" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return "photos", {"sidecar": ".txt", "output": "photos/metadata.jsonl"}


def shards(place):
    (place / "shards").mkdir()
    size = -(-NUM_PICTURES // SHARDS)
    for shard in range(SHARDS):
        with tarfile.open(place / "shards" / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * size, min(shard * size + size, NUM_PICTURES)):
                content = picture(number)
                member = tarfile.TarInfo(f"{number:05}.png")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return f"shards/{{00000..{SHARDS - 1:05}}}.tar", {"output": "out/"}


def parquet(place):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"image": {"bytes": picture(number), "path": f"{number:05}.png"}} for number in range(NUM_PICTURES)]
    parquet.write_table(arrow.Table.from_pylist(rows), place / "pictures.parquet", row_group_size=100)
    return "pictures.parquet", {"output": "captions.parquet"}


def command(place, source, options):
    return subprocess.Popen(
        [sys.executable, SCRIPT, "notes", source, json.dumps(options), str(BATCH_SIZE), MODEL], cwd=place,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(place, source, options):
    child = command(place, source, options)
    _, told = child.communicate()
    assert child.returncode == 0, told.decode()


def files(place):
    """All that is there but journals and notes."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and not any(part.endswith(".blip2") for part in path.parts)
        and not path.name.startswith("notes")
    }  # fmt: skip


def killed_after(place, source, options, seconds):
    """Whether it was still at work then."""
    child = command(place, source, options)
    time.sleep(seconds)
    if child.poll() is not None:
        assert child.returncode == 0, child.stderr.read().decode()
        return False
    child.send_signal(signal.SIGKILL)
    child.wait()
    return True


def peaks(place):
    """Of memory in KiB, after 2,000 images and at the end."""
    return [int(line.split()[1]) for line in (place / "notes.memory").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(300 + NUM_PICTURES // 2)
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("make", [folder, shards, parquet])
def test_killed_at_random(tmp_path, make):
    places = tmp_path / "undisturbed", tmp_path / "killed"
    for place in places:
        place.mkdir()
        source, options = make(place)
    undisturbed, killed = places
    started = time.monotonic()
    finished(undisturbed, source, options)
    whole_s, memory = time.monotonic() - started, peaks(undisturbed)
    started = time.monotonic()
    finished(undisturbed, source, options)  # all is done: only outputs of the whole are written
    nothing_s = time.monotonic() - started

    chance = random.Random(13)
    kills, is_done = 0, False
    while kills < NUM_KILLS:
        # At its start, on the way, and, when all units are done, while outputs of the whole are written.
        share_s = 0 if is_done else 2 * max(whole_s - nothing_s, 0) / NUM_KILLS * chance.random()
        if killed_after(killed, source, options, chance.uniform(0, nothing_s) + share_s):
            kills += 1
        else:
            is_done = True
    finished(killed, source, options)

    assert files(killed) == files(undisturbed)
    times = Counter((killed / "notes").read_text().split())
    assert len(times) == NUM_PICTURES
    assert times.total() - NUM_PICTURES <= kills * BATCH_SIZE  # what the model was at when it was killed
    if len(memory) == 2 and make is not parquet:  # of which all is written at the end
        assert memory[1] <= 1.05 * memory[0]
    print(
        f"\n{make.__name__}, {MODEL}: {kills} kills (all done before the last: {is_done}), "
        f"{times.total()} pictures seen for {NUM_PICTURES}, {len(files(killed))} files equal, "
        f"{whole_s:.0f} s undisturbed, peak {memory} KiB"
    )


def many_files(place):
    return engines.folder(place, [f"{number % 3}_set/{number:05}.png" for number in range(NUM_PICTURES)])


def many_shards(place):
    return engines.shards(place, NUM_PICTURES // 4)


@pytest.mark.slow
@pytest.mark.timeout(300 + NUM_PICTURES // 2)
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("machines", [engines.BOTH, {"engine": "ray", "replicas": 2}], ids=["devices", "ray"])
@pytest.mark.parametrize("make", [many_files, many_shards])
def test_one_of_two_workers_is_killed(tmp_path, monkeypatch, make, machines):
    if machines.get("engine") == "ray" and find_spec("ray") is None:  # importing it would fix its settings
        pytest.skip("needs ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    engines.assert_the_same(make, (tmp_path / "one", tmp_path / "several"), machines, NUM_PICTURES)
