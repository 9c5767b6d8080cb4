"""Features kept of collections: what is learnt from them, what of them is made anew, and by how many processes."""

import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from blip2 import train
from blip2.data.kept import RECORD
from blip2.errors import RecipeError
from blip2.train.check import gather
from blip2.train.launch import launch
from blip2.train.recipes import load_recipe
from blip2.vision import VisionTransformer
from tests.collection.written import jpeg, sample, shards, tar
from tests.train.processes import in_processes
from tests.train.test_distributed import assert_same_training
from tests.train.written import write

SHARDS = '[data]\nsources = "s/{00000..00001}.tar"\nmax_prompt_tokens = 64\n'
SEVERAL = """
[data]
max_prompt_tokens = 64
[[data.sources]]
source = "s/{00000..00001}.tar"
weight = 2
[[data.sources]]
source = "a.parquet"
[[data.sources]]
source = "rows.jsonl"
"""


@pytest.fixture
def collections(tmp_path):
    """Shards with an image that cannot be read, parquet, and rows of which two show the same image."""
    shards(tmp_path / "s", [6])
    members = [member for number in range(6, 11) for member in sample(number, txt=f"dog {number}")]
    members[2] = (members[2][0], b"no picture")
    tar(tmp_path / "s" / "00001.tar", dict(members))
    table = {"image": [{"bytes": jpeg(n), "path": None} for n in range(20, 25)], "caption": ["a red cat"] * 5}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=2)
    lines = [{"image": f"{number}.jpg", "caption": f"car {text}"} for text, number in enumerate((30, 31, 30, 32))]
    for number in (30, 31, 32):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def losses(out):
    """Of each step."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [[line[name] for name in ("itc", "itm", "lm") if name in line] for line in log if "lm" in line]
    assert len(found) == 8
    return found


def with_features(data, folder="f"):
    return data.replace("[data]", f'[data]\nfeatures = "{folder}"')


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        (1, SEVERAL),
        (2, SHARDS),
        pytest.param(1, SHARDS, marks=pytest.mark.slow),
        pytest.param(2, SEVERAL, marks=pytest.mark.slow),
    ],
)
def test_what_is_learnt_is_the_same(tmp_path, collections, matching_model, opt_model, stage, data):
    """By one process, by two, and without features."""
    start, changes = matching_model if stage == 1 else opt_model, {"log_every": 1}
    told = []
    path = write(tmp_path / "kept.toml", with_features(data), start, stage)
    kept = train.run(path, overrides=changes, report=told.append)
    plain = train.run(write(tmp_path / "plain.toml", data, start, stage), overrides=changes)
    assert seen(told) == [(11, 11) if data == SHARDS else (19, 19)]  # two rows show one image
    assert "unreadable images: 1," in told[-1].message
    for one, other in zip(losses(kept), losses(plain), strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    # Two processes make the same files, and learn the same of them.
    training = {"path": str(path), "data.features": str(tmp_path / "g"), "out": str(tmp_path / "two")} | changes
    in_processes(2, tmp_path / "found.pt", "[]", json.dumps(training))
    assert_same_training(tmp_path / "two", kept)
    assert contents(tmp_path / "f") == contents(tmp_path / "g") != {}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def seen(told):
    """How many features were there after each batch, of how many."""
    return [(progress.step, progress.steps) for progress in told if progress.phase == "features"]


def test_of_a_changed_shard_only_what_is_another_picture_is_seen_again(tmp_path, collections, matching_model):
    path, told = write(tmp_path / "a.toml", with_features(SEVERAL), matching_model, steps=1), []
    train.run(path)
    [file] = (tmp_path / "f").glob("*.bin")
    before = np.frombuffer(file.read_bytes(), np.uint8).reshape(19, -1)
    os.utime(tmp_path / "s" / "00000.tar")
    train.run(path, overrides={"out": "b"}, report=told.append)
    assert seen(told) == []
    tar(tmp_path / "s" / "00000.tar", dict(pair for n in (0, 1, 90, 3, 4, 5) for pair in sample(n, txt=f"dog {n}")))
    train.run(path, overrides={"out": "c"}, report=told.append)
    assert seen(told) == [(19, 19)]
    after = np.frombuffer(file.read_bytes(), np.uint8).reshape(19, -1)
    assert np.flatnonzero((before != after).any(1)).tolist() == [2]
    assert [each.name for each in (tmp_path / "f").glob("*.bin")] == [file.name]


def test_what_another_set_has_of_the_same_picture_is_not_computed_again(
    tmp_path, collections, matching_model, monkeypatch
):
    """Shards that are added, and rows that move, cost what is new of them; what is damaged is computed."""
    path = write(tmp_path / "a.toml", with_features('[data]\nsources = "s"'), matching_model, steps=1)
    shutil.move(tmp_path / "s" / "00001.tar", tmp_path / "00001.tar")
    train.run(path)
    [old] = (tmp_path / "f").glob("*.bin")
    shutil.move(tmp_path / "00001.tar", tmp_path / "s" / "00001.tar")
    tar(tmp_path / "s" / "00000.tar", dict(pair for n in (5, 90, 0, 1, 2, 3, 4) for pair in sample(n, txt="dog")))
    with old.open("r+b") as file:
        file.write(b"damaged")  # of image 0
    computed, see = [], VisionTransformer.features
    monkeypatch.setattr(
        VisionTransformer, "features", lambda self, pixels: computed.append(len(pixels)) or see(self, pixels)
    )
    train.run(path, overrides={"out": "b"})
    assert computed == [1 + 1 + 4]  # 90, the damaged one, and what can be read of the other shard
    [new] = {*(tmp_path / "f").glob("*.bin")} - {old}
    train.run(path, overrides={"out": "c", "data.features": "g"})
    assert computed == [6, 11]
    kept, alone = (np.frombuffer((tmp_path / name / new.name).read_bytes(), np.float16) for name in "fg")
    np.testing.assert_allclose(kept, alone, rtol=2e-3, atol=2e-3)


def recorded(folder):
    records = np.frombuffer((folder / "rows.seen").read_bytes(), RECORD)
    return np.flatnonzero(records["crc32"]).tolist()


@pytest.mark.slow
def test_one_that_is_killed_loses_a_batch_at_most(tmp_path, matching_model):
    """And what it had made is not made again, by another number of processes either."""
    shards(tmp_path / "s", [9, 6])
    path = write(tmp_path / "a.toml", SHARDS, matching_model)
    processes = in_processes(
        2, path, tmp_path / "f", 2, 1, 3, module="tests.train.keeping", wait=False
    )  # of 8 batches of 2, one process has the first 4
    assert processes[1].wait(120) == -9
    deadline = time.monotonic() + 120
    while len(recorded(tmp_path / "f")) < 14 and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[0].kill()
    for process in processes:
        process.communicate()
    assert recorded(tmp_path / "f") == list(range(14))
    in_processes(3, path, tmp_path / "f", 2, -1, 0, module="tests.train.keeping")
    assert sum(int((tmp_path / "f" / f"made{rank}").read_text()) for rank in range(3)) == 1
    in_processes(1, path, tmp_path / "g", 2, -1, 0, module="tests.train.keeping")
    for name in ("rows.bin", "rows.seen", "rows.json"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "g" / name).read_bytes(), name


@pytest.mark.slow
def test_all_begin_with_the_same(tmp_path, matching_model, monkeypatch):
    """A process that is late divides what is missing as the others do, who have not written since."""
    monkeypatch.setenv("LATE", "1")
    shards(tmp_path / "s", [9, 6])
    path = write(tmp_path / "a.toml", SHARDS, matching_model)
    in_processes(2, path, tmp_path / "f", 2, -1, 0, module="tests.train.keeping")
    assert recorded(tmp_path / "f") == list(range(15))


def test_what_is_wrong_is_told_once(tmp_path, collections, matching_model, capfd):
    """An image that is to end the training, by whichever process it is found; a folder that cannot be one."""
    path = write(tmp_path / "a.toml", with_features(SHARDS), matching_model)
    with pytest.raises(Exception, match=r"00001\.tar: 000007: .*; or skip such images"):
        train.run(path, overrides={"data.on_bad_picture": "stop"})
    capfd.readouterr()
    assert launch(["train", str(path), "--set=data.on_bad_picture=stop"], 2) == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("blip2: ")]
    assert "00001.tar: 000007: not a JPEG" in line and "or skip such images" in line
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(RecipeError, match=r"data\.features: .*blocked is not writable"):
        train.run(path, overrides={"data.features": "blocked"})


def test_room_is_looked_for_before_anything_is_computed(tmp_path, collections, matching_model, monkeypatch):
    """Of 19 images of 5 tokens of 16 numbers; rows that show the same one need it once."""
    path = write(tmp_path / "a.toml", with_features(SEVERAL), matching_model)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=19 * 5 * 16 * 2 - 1))
    with pytest.raises(RecipeError, match=r"features of 19 images take .* set data\.features_dtype = \"int8\", or "):
        gather(load_recipe(path), path)
    gather(load_recipe(path, {"data.features_dtype": "int8"}), path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=19 * 5 * 16 * 2))
    gather(load_recipe(path), path)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_in_a_byte_each(tmp_path, collections, matching_model, dtype):
    path = write(tmp_path / "a.toml", with_features(SEVERAL), matching_model)
    whole = train.run(path, overrides={"log_every": 1})
    out = train.run(path, overrides={"log_every": 1, "data.features_dtype": dtype, "out": "b"})
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "f").glob("*.bin")}
    [half], [less] = ([size for name, size in sizes.items() if (dtype in name) == of] for of in (False, True))
    assert less == half * (16 + 4) / 32  # of width 16
    for one, other in zip(losses(out), losses(whole), strict=True):
        assert one == pytest.approx(other, rel=0.1) and one != other
    with pytest.raises(RecipeError, match=r"was saved with data\.features_dtype = "):
        train.run(path, overrides={"out": "b", "optim.steps": 9})
