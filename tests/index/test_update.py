"""An index follows its folders: what is new, changed, gone, broken; nothing done twice, nothing lost."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blip2
from blip2.errors import IndexFileError, OptionError
from blip2.index import Changes, update
from blip2.index.unfinished import Unfinished, held
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def index(tmp_path) -> Path:
    return tmp_path / "photos.index"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sys.modules[update.__module__], "SHARD_IMAGES", 2)


def never(name, kind):
    raise AssertionError("a model was loaded for nothing")


def names(index) -> list[str]:
    return [Path(path).name for path in blip2.Index.open(index).paths]


def test_what_is_kept_is_what_the_model_sees(index, photos, matcher):
    assert blip2.Index.update(index, photos, matcher) == Changes(new=8, changed=0, gone=0, unreadable=0, total=8)
    opened = blip2.Index.open(index)
    assert opened.paths == sorted(str(path) for path in photos.rglob("*.png"))
    expected_NQE = matcher.embed_images(opened.paths)
    assert opened.vectors.dtype == torch.float16
    assert torch.equal(opened.vectors, expected_NQE.half())
    assert (opened.kind, len(opened)) == ("search", 8)
    assert not index.with_name("photos.index.unfinished").exists()


def test_a_second_run_loads_no_model_and_writes_nothing(index, photos, matcher):
    blip2.Index.update(index, photos, matcher)
    before = index.stat()
    assert update(index, [photos], never) == Changes(0, 0, 0, 0, 8)
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_new_changed_gone(index, photos, matcher, monkeypatch):
    blip2.Index.update(index, photos, matcher)
    tiny.picture(100).save(photos / "new.png")
    tiny.picture(101, 44).save(photos / "picture001.png")
    (photos / "picture002.png").unlink()
    encoded = []
    each_encoded = matcher.each_encoded
    monkeypatch.setattr(matcher, "each_encoded", lambda paths, **options: encoded.extend(paths) or each_encoded(
        paths, **options))  # fmt: skip
    assert blip2.Index.update(index, photos, matcher) == Changes(1, 1, 1, 0, 8)
    assert encoded == [str(photos / "new.png"), str(photos / "picture001.png")]
    again = index.with_name("again.index")
    blip2.Index.update(again, photos, matcher)
    assert index.read_bytes() == again.read_bytes()


def test_a_picture_is_known_by_its_content(index, photos, matcher, monkeypatch):
    """One that was replaced with its size and time kept is seen again; one that was only touched or copied is not."""
    replaced, touched = photos / "picture001.png", photos / "picture002.png"
    os.truncate(replaced, 2000)  # what follows a PNG's end is no part of it
    blip2.Index.update(index, photos, matcher)
    before = replaced.stat()
    while replaced.stat().st_ctime_ns == before.st_ctime_ns:  # a tick of the system's clock, some milliseconds
        tiny.picture(101).save(replaced)
        os.truncate(replaced, 2000)
        os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(touched, ns=(1, 1))
    encoded = []
    each_encoded = matcher.each_encoded
    monkeypatch.setattr(matcher, "each_encoded", lambda paths, **options: encoded.extend(paths) or each_encoded(
        paths, **options))  # fmt: skip
    assert blip2.Index.update(index, photos, matcher) == Changes(0, 1, 0, 0, 8)
    assert encoded == [str(replaced)]
    again = index.with_name("again.index")
    blip2.Index.update(again, photos, matcher)
    assert index.read_bytes() == again.read_bytes()
    assert update(index, [photos], never) == Changes(0, 0, 0, 0, 8)


def test_other_pixels_of_the_same_model_are_not_mixed(index, photos, matching_model, tmp_path):
    """Mean and deviation of the preprocessor are part of what made an index."""
    blip2.Index.update(index, photos, blip2.load(matching_model))
    other = shutil.copytree(matching_model, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(IndexFileError, match="cannot read its vectors"):
        blip2.Index.update(index, photos, blip2.load(other))
    with pytest.raises(IndexFileError, match="cannot read its vectors"):
        blip2.Index.open(index).search(blip2.load(other), "two dogs")


def test_folders_that_are_not_named_stay(index, photos, matcher):
    blip2.Index.update(index, photos / "within", matcher)
    shutil.rmtree(photos / "within")
    changes = blip2.Index.update(index, [photos / "picture000.png"], matcher)
    assert changes == Changes(1, 0, 0, 0, 4)
    assert blip2.Index.update(index, photos, matcher) == Changes(4, 0, 3, 0, 5)


def test_a_folder_whose_name_begins_alike_is_another(index, photos, matcher):
    shutil.copytree(photos / "within", photos / "within2")
    blip2.Index.update(index, [photos / "within2"], matcher)
    assert blip2.Index.update(index, [photos / "within"], matcher) == Changes(3, 0, 0, 0, 6)


def test_hidden_files_links_to_folders_and_other_files_are_passed_over(index, photos, matcher):
    shutil.copy(photos / "picture000.png", photos / ".hidden.png")
    (photos / "notes.txt").write_text("no image")
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    assert blip2.Index.update(index, photos, matcher).total == 8


def test_a_picture_that_cannot_be_read_is_told_and_left_out(index, photos, matcher):
    (photos / "broken.png").write_bytes(b"\x89PNG and then nothing")
    problems = []
    changes = blip2.Index.update(index, photos, matcher, on_problem=problems.append)
    assert changes == Changes(8, 0, 0, 1, 8)
    assert len(problems) == 1 and "broken.png" in problems[0]
    assert str(changes) == "8 new, 0 changed, 0 gone, 1 could not be read"
    # A later run tells it again, and needs no model to find out.
    assert update(index, [photos], never, on_problem=problems.append).unreadable == 1
    assert len(problems) == 2


def test_a_picture_that_breaks_is_not_found_by_what_it_showed(index, photos, matcher):
    blip2.Index.update(index, photos, matcher)
    (photos / "picture000.png").write_bytes(b"broken")
    assert blip2.Index.update(index, photos, matcher) == Changes(0, 0, 0, 1, 7)
    assert "picture000.png" not in names(index)


def test_what_an_index_knows_of_a_folder_that_cannot_be_read_stays(index, photos, matcher, monkeypatch):
    blip2.Index.update(index, photos, matcher)
    (photos / "picture000.png").unlink()
    scandir, problems = os.scandir, []

    def refusing(path):
        if str(path).endswith("within"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refusing)
        changes = blip2.Index.update(index, photos, matcher, on_problem=problems.append)
    assert changes == Changes(0, 0, 1, 0, 7)
    assert len(problems) == 1 and f"{photos / 'within'}: this folder cannot be read" in problems[0]
    assert blip2.Index.update(index, photos, matcher) == Changes(0, 0, 0, 0, 7)


def test_one_place_that_is_not_there_does_not_stop_the_others(index, photos, matcher):
    problems, notes = [], []
    blip2.Index.update(index, [photos / "within"], matcher)
    shutil.move(photos / "within", photos / "away")
    (photos / "away" / "notes.txt").touch()
    places = [photos / "within", photos / "missing.png", photos / "away"]
    found = update(index, places, lambda *_: matcher, on_problem=problems.append, on_note=notes.append)
    assert found == Changes(3, 0, 0, 0, 6)
    assert [problem.split(": ")[1] for problem in problems] == ["no such file or folder; check the path"] * 2
    assert notes == ["skipped in folders: 1 other file (1 .txt)"]
    with pytest.raises(IndexFileError, match=r"no such file or folder.*the index is unchanged"):
        blip2.Index.update(index, [photos / "within"], matcher)


def test_what_is_left_out_of_a_folder_is_forgotten(index, photos, matcher):
    blip2.Index.update(index, photos, matcher)
    assert blip2.Index.update(index, photos, matcher, exclude=["picture000.png"]) == Changes(0, 0, 1, 0, 7)
    assert blip2.Index.update(index, photos, matcher, recursive=False) == Changes(1, 0, 3, 0, 5)


def test_names_that_are_no_utf_8_come_back(index, photos, matcher):
    odd = os.fsencode(photos) + b"/caf\xe9\n.png"
    shutil.copy(os.fsencode(photos / "picture000.png"), odd)
    blip2.Index.update(index, photos, matcher)
    assert os.fsdecode(odd) in blip2.Index.open(index).paths
    assert update(index, [photos], never).new == 0


def test_progress_counts_what_is_to_do(index, photos, matcher):
    calls = []
    blip2.Index.update(index, photos, matcher, batch_size=3, on_progress=lambda *call: calls.append(call))
    assert calls == [(number, 8) for number in range(1, 9)]


def test_for_asking(index, photos, blip):
    blip2.Index.update(index, photos, blip)
    opened = blip2.Index.open(index)
    assert opened.kind == "ask"
    for path, seen in zip(opened.paths, opened, strict=True):
        assert torch.equal(seen.queries_QD, blip.encode(path).queries_QD.half())
    assert blip.ask(opened[:3], "is it red?", max_new_tokens=4) == blip.ask(
        opened.paths[:3], "is it red?", max_new_tokens=4
    )


# ---- stopped ----


class Stopped(BaseException):
    pass


def test_what_was_encoded_is_not_encoded_again(index, photos, matcher, small_shards):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blip2.Index.update(index, photos, matcher, on_progress=stop)
    assert not index.exists()
    counts = []
    changes = blip2.Index.update(index, photos, matcher, on_progress=lambda *call: counts.append(call))
    assert counts[-1] == (3, 3)
    assert changes == Changes(8, 0, 0, 0, 8)


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("call", range(1, 6))
def test_stopped_at_a_write_and_finished(index, photos, matcher, small_shards, monkeypatch, function, call):
    made = index.with_name("made.index")
    blip2.Index.update(made, photos, matcher)
    calls = 0
    true = getattr(os, function)

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Stopped
        return true(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, stop)
        with pytest.raises(Stopped):
            blip2.Index.update(index, photos, matcher)
    blip2.Index.update(index, photos, matcher)
    assert index.read_bytes() == made.read_bytes()
    assert not index.with_name("photos.index.unfinished").exists()


def test_what_was_done_is_kept_by_time_too(index, photos, matcher, monkeypatch):
    """Each image by itself where one takes longer than may be lost; the index is the same."""
    made = index.with_name("made.index")
    blip2.Index.update(made, photos, matcher)
    module = sys.modules[update.__module__]
    clock = itertools.count(0, 20)  # seconds, each time somebody looks
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("blip2.tasks.see.CACHE_BYTES", 1)  # the images of a batch one after the other
    kept, add = [], Unfinished.add
    monkeypatch.setattr(Unfinished, "add", lambda *arguments: kept.append(len(arguments[2])) or add(*arguments))
    encode, encoded = matcher.frontend._encode_pixels, []
    monkeypatch.setattr(matcher.frontend, "_encode_pixels", lambda pixels: encoded.append(pixels) or encode(pixels))

    def check(done, total):
        assert len(encoded) == done  # none ahead of those that were handed over

    blip2.Index.update(index, photos, matcher, on_progress=check)
    assert max(kept) <= 2 and sum(kept) == 8
    assert index.read_bytes() == made.read_bytes()


def test_what_changed_since_the_stop_is_encoded_again(index, photos, matcher, small_shards):
    with pytest.raises(Stopped):
        blip2.Index.update(index, photos, matcher, on_progress=stop_at(6))
    tiny.picture(9, 44).save(photos / "picture000.png")
    (photos / "picture001.png").unlink()
    blip2.Index.update(index, photos, matcher)
    again = index.with_name("again.index")
    blip2.Index.update(again, photos, matcher)
    assert index.read_bytes() == again.read_bytes()


def test_what_another_model_left_is_not_taken(index, photos, matcher, small_shards, other_matcher):
    with pytest.raises(Stopped):
        blip2.Index.update(index, photos, other_matcher, on_progress=stop_at(6))
    blip2.Index.update(index, photos, matcher)
    assert torch.equal(blip2.Index.open(index).vectors, matcher.embed_images(blip2.Index.open(index).paths).half())


def stop_at(number):
    def stop(done, total):
        if done == number:
            raise Stopped

    return stop


RUN = """
import sys, time
import blip2
from blip2.index import update
sys.modules[update.__module__].SHARD_IMAGES = 8
matcher = blip2.load(sys.argv[1], device="cpu")
print("started", flush=True)
blip2.Index.update(sys.argv[2], sys.argv[3], matcher, on_progress=lambda done, total: time.sleep(0.005))
print("finished", flush=True)
"""


def killed_and_finished(index: Path, photos: Path, model: Path, kills: int) -> None:
    chance = random.Random(3)
    command = [sys.executable, "-c", RUN, str(model), str(index), str(photos)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = 0
    for _ in range(kills):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None and run.stdout.readline() == "started\n"
            time.sleep(chance.uniform(0.02, 0.4))
            run.send_signal(signal.SIGKILL)
            killed += run.wait() == -signal.SIGKILL
        assert not index.exists() or killed < kills
    assert killed
    assert subprocess.run(command, env=environment, capture_output=True, check=True).stdout.endswith(b"finished\n")


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_finished(tmp_path, matching_model, kills):
    photos = tmp_path / "many"
    photos.mkdir()
    tiny.save_pictures(photos, 40 + 30 * kills)
    killed_and_finished(tmp_path / "killed.index", photos, matching_model, kills)
    blip2.Index.update(tmp_path / "made.index", photos, blip2.load(matching_model, device="cpu"))
    assert (tmp_path / "killed.index").read_bytes() == (tmp_path / "made.index").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.index*")) == ["killed.index", "made.index"]


# ---- what cannot be done ----


def told(error) -> str:
    """What is told is one line, with a remedy behind a semicolon."""
    message = str(error.value)
    assert "\n" not in message and ";" in message
    return message


def test_another_model(index, photos, matcher, other_matcher):
    blip2.Index.update(index, photos, matcher)
    before = index.read_bytes()
    with pytest.raises(IndexFileError) as error:
        blip2.Index.update(index, photos, other_matcher)
    assert matcher.name in told(error) and other_matcher.name in told(error)
    with pytest.raises(IndexFileError):
        update(index, [photos], lambda name, kind: other_matcher, model=other_matcher.name)
    assert index.read_bytes() == before


def test_the_same_model_by_another_name(index, photos, matcher, matching_model, tmp_path):
    blip2.Index.update(index, photos, matcher)
    moved = shutil.copytree(matching_model, tmp_path / "moved")
    assert blip2.Index.update(index, photos, blip2.load(moved)) == Changes(0, 0, 0, 0, 8)
    assert blip2.Index.open(index).model_name == str(moved)


def test_a_folder_is_remembered_from_anywhere(index, photos, matching_model, monkeypatch):
    monkeypatch.chdir(matching_model.parent)
    blip2.Index.update(index, photos, blip2.load(matching_model.name))
    assert blip2.Index.open(index).model_name == str(matching_model)


def test_another_kind(index, photos, matcher, blip):
    blip2.Index.update(index, photos, matcher)
    with pytest.raises(IndexFileError, match="is an index to search, not to ask"):
        blip2.Index.update(index, photos, blip)
    with pytest.raises(OptionError, match="cannot make an index for ask"):
        update(index.with_name("other.index"), [photos], lambda name, kind: matcher, kind="ask")
    with pytest.raises(OptionError, match="kind is 'find'"):
        update(index, [photos], never, kind="find")


def test_an_empty_folder_forgets_nothing(index, photos, matcher, tmp_path):
    """It may be a drive that is not there today."""
    blip2.Index.update(index, photos, matcher)
    before = index.read_bytes()
    for folder in (photos, photos / "within"):
        for path in folder.glob("*.png"):
            path.unlink()
    with pytest.raises(IndexFileError, match="there are no images in this folder") as error:
        update(index, [photos], never)
    assert "unchanged" in told(error)
    with pytest.raises(IndexFileError, match="no such file or folder"):
        update(index, [photos / "missing"], never)
    with pytest.raises(IndexFileError, match="name at least one"):
        update(index, [], never)
    assert index.read_bytes() == before


def test_nothing_that_can_be_read(index, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    problems = []
    with pytest.raises(IndexFileError, match="none of the images can be read"):
        update(index, [tmp_path], never, on_problem=problems.append)
    assert len(problems) == 1
    assert not index.exists() and not index.with_name("photos.index.unfinished").exists()


def test_what_is_there_is_no_index(index, photos):
    for content in (b"", b"garbage" * 100, tiny.CORPUS[0].encode()):
        index.write_bytes(content)
        with pytest.raises(IndexFileError, match="not an index of images") as error:
            update(index, [photos], never)
        assert str(index) in told(error)
        assert index.read_bytes() == content


def test_places_that_cannot_be_written(index, photos, tmp_path):
    with pytest.raises(IndexFileError, match="is a folder") as error:
        update(tmp_path, [photos], never)
    told(error)
    with pytest.raises(IndexFileError, match="cannot be written") as error:
        update(tmp_path / "missing" / "photos.index", [photos], never)
    told(error)
    (tmp_path / "file").touch()
    with pytest.raises(IndexFileError, match="cannot be written"):
        update(tmp_path / "file" / "photos.index", [photos], never)


def test_a_full_disk(index, photos, matcher, small_shards):
    """As it looks to the program: writing fails half-way."""
    blip2.Index.update(index, photos / "within", matcher)
    before = index.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))  # enough for a part, not for the whole
    try:
        with pytest.raises(IndexFileError, match="cannot be written") as error:
            blip2.Index.update(index, photos, matcher)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "free some space" in told(error)
    assert index.read_bytes() == before
    counts = []
    assert blip2.Index.update(index, photos, matcher, on_progress=lambda *call: counts.append(call)).total == 8
    assert counts == []


def test_two_at_once(index, photos, matcher):
    with held(index), pytest.raises(IndexFileError, match="another run is writing") as error:
        blip2.Index.update(index, photos, matcher)
    assert str(index) in told(error)
    assert blip2.Index.update(index, photos, matcher).total == 8


def test_a_damaged_index_is_not_carried_on(index, photos, matcher):
    blip2.Index.update(index, photos, matcher)
    content = bytearray(index.read_bytes())
    content[len(content) // 2 - 700] ^= 255
    index.write_bytes(content)
    tiny.picture(100).save(photos / "new.png")
    with pytest.raises(IndexFileError, match="is damaged"):
        blip2.Index.update(index, photos, matcher)
    assert index.read_bytes() == content
