"""A collection by several workers: what one run writes, whoever dies."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from functools import partial
from importlib.util import find_spec
from io import BytesIO

import pytest

from blip2.api.collect import CollectionRun, Model, asking, captioning, matching
from blip2.api.loading import as_pipeline
from blip2.api.machines import Machines
from blip2.collection.dispatch import Died, Done, More, Ready, Some, dispatch
from blip2.collection.journal import Journal
from blip2.collection.record import SUCCESS, Result
from blip2.collection.request import Request, planned
from blip2.errors import CheckpointError, CollectionError, OptionError
from tests.collection.noting_work import BATCH_SIZE, noting, unloadable
from tests.collection.written import jpeg
from tests.collection.written_by_run import drawn

NUM_PICTURES = 60
NAMES = [f"{number % 3}_set/{number:02}.png" for number in range(NUM_PICTURES)]
BOTH = {"devices": "cpu,cpu"}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr("blip2.collection.sources.files.UNIT_FILES", 16)


def folder(place, names=NAMES):
    drawn(place / "photos", *names)
    return place / "photos", {"sidecar": ".txt", "output": str(place / "photos" / "metadata.jsonl")}


def shards(place, size=15):
    pytest.importorskip("webdataset")
    (place / "shards").mkdir(parents=True)
    for shard in range(4):
        with tarfile.open(place / "shards" / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * size, shard * size + size):
                content = jpeg(number, "PNG")
                member = tarfile.TarInfo(f"{number:05}.png")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return place / "shards" / "{00000..00003}.tar", {"output": f"{place / 'out'}/"}


def written(place):
    """All files but journals and notes."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and ".blip2" not in str(path) and path.parent != place
    }


def begin(place, source, options, machines, pause_s=0.0, work=None):
    plan = planned(Request.of([str(source)], dict(options)))
    work = work or partial(noting, str(place / "notes"), pause_s)
    return CollectionRun(plan, Model(as_pipeline, None, {}), work, BATCH_SIZE, Machines(**machines))


def noted(place):
    """Processes and keys."""
    return [line.split() for line in (place / "notes").read_text("utf-8").splitlines()]


class Killer:
    """Kills a worker as soon as there are so many results."""

    def __init__(self, place, after=5):
        self._place, self._after = place, after
        self.killed = 0

    def __call__(self, summary, results):
        if not self.killed and summary.done >= self._after:
            self.killed = int(noted(self._place)[-1][0])
            os.kill(self.killed, signal.SIGKILL)


@pytest.fixture
def places(tmp_path):
    return tmp_path / "one", tmp_path / "several"


def assert_the_same(make, places, machines, number=NUM_PICTURES):
    one, several = places
    begin(one, *make(one), {}).run()
    killer = Killer(several, number // 12)
    summary = begin(several, *make(several), machines, pause_s=0.02).run(killer)
    assert written(several) == written(one)
    assert (summary.done, summary.before, summary.failed) == (number, 0, 0) and summary.is_complete
    times = Counter(key for _, key in noted(several))
    assert killer.killed and len(times) == number
    assert times.total() - number <= BATCH_SIZE  # what the one that was killed was at
    workers = Counter(process for process, _ in noted(several))
    assert len(workers) >= 2
    print(
        f"\n{make.__name__}, {machines}: {killer.killed} was killed, {times.total()} pictures seen for {number} "
        f"by {dict(workers)}, {len(written(several))} files equal, {summary.seconds:.0f} s"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("make", [folder, shards])
def test_two_processes_of_which_one_is_killed(places, make):
    assert_the_same(make, places, BOTH)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_two_actors_of_which_one_is_killed(places, monkeypatch):
    if find_spec("ray") is None:  # importing it would fix its settings
        pytest.skip("needs ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert_the_same(folder, places, {"engine": "ray", "replicas": 2})


@pytest.mark.slow
def test_a_picture_that_kills_is_left_when_all_else_is_done(tmp_path):
    source, options = folder(tmp_path)
    (tmp_path / "notes.deadly").touch()
    with pytest.raises(CollectionError, match=r"3 workers died during it \(it ended with code 9\); the rest is done"):
        begin(tmp_path, source, options, BOTH).run()
    left = {name for name in NAMES if not (source / name).with_suffix(".txt").exists()}
    assert "1_set/13.png" in left and len(left) <= 16
    (tmp_path / "notes.deadly").unlink()
    assert begin(tmp_path, source, options, {}).run().is_complete


def test_the_bundled_model_in_a_worker(tmp_path):
    source, options = folder(tmp_path)
    alone, by_worker = ({**options, "output": str(tmp_path / f"{name}.csv"), "limit": None} for name in "ab")
    captioning(source, num_beams=1, max_new_tokens=4, **alone).run()
    for sidecar in source.rglob("*.txt"):
        sidecar.unlink()
    captioning(source, num_beams=1, max_new_tokens=4, devices="cpu", **by_worker).run()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    found = [json.loads((tmp_path / f".{name}.csv.blip2" / "run.json").read_text())["found"] for name in "ab"]
    assert found[0].pop("output") and found[1].pop("output") and found[0] == found[1] and found[0]["the model"]


@pytest.mark.parametrize("begun", [
    lambda source, output: captioning(source, output, num_captions=2, pick="best"),
    lambda source, output: asking(source, ["how many?", "where?"], output),
    lambda source, output: matching(source, ["a cat"], output),
])  # fmt: skip
def test_all_verbs_can_be_sent_to_workers(tmp_path, begun):
    source, _ = folder(tmp_path)
    made = begun(source, tmp_path / "out.jsonl")
    work, model, plan = pickle.loads(pickle.dumps((made.work, made.model, made.plan.source)))
    assert work.func is made.work.func and model == made.model and plan.units == made.plan.source.units


def test_what_goes_wrong_in_a_worker_is_told_once(tmp_path, capfd):
    source, options = folder(tmp_path)
    with pytest.raises(AssertionError, match="is made in a worker"):
        begin(tmp_path, source, options, BOTH, work=unloadable).run()
    (tmp_path / "broken").mkdir()
    other = {"sidecar": ".caption"}
    with pytest.raises(CheckpointError, match="broken"):
        captioning(source, model=tmp_path / "broken", devices="cpu", **other).run()
    assert capfd.readouterr() == ("", "")
    assert not [*source.rglob("*.txt"), *source.rglob("*.caption")]


@pytest.mark.parametrize(
    ("machines", "words"),
    [
        ({"devices": "tpu"}, "numbers of GPUs such as 0,1, or cpu,cpu"),
        ({"devices": "0,99"}, "there is no GPU|the last one is"),
        ({"devices": ""}, "numbers of GPUs"),
        ({"devices": []}, "is empty"),
        ({"devices": "cpu", "engine": "ray"}, "exclude each other"),
        ({"replicas": 2}, "add that, or leave it out"),
        ({"address": "auto"}, "add that, or leave it out"),
        ({"engine": "spark"}, "use 'ray'"),
        ({"engine": "ray", "replicas": 0}, "use 1 or more"),
        ({"devices": "cpu", "limit": 3}, "does not work with workers"),
        ({"devices": "cpu", "device": "cuda"}, "exclude each other"),
    ],
)
def test_what_does_not_go_together(tmp_path, machines, words):
    if machines.get("engine") == "ray" and find_spec("ray") is None:
        pytest.skip("needs ray")
    source, options = folder(tmp_path)
    with pytest.raises(OptionError, match=words):
        captioning(source, **options, **machines)


# ---- the one that gives ----


class Scripted:
    """Workers that do nothing: what they say is written down before."""

    def __init__(self, *said, number=1):
        self.number = number
        self._said = iter(said)
        self.done = []

    def start(self, worker):
        self.done.append(("start", worker))

    def give(self, worker, given):
        self.done.append((worker, given and (given.unit.number, given.again)))

    def receive(self):
        return next(self._said)

    def close(self):
        self.done.append("close")


@pytest.fixture
def job(tmp_path):
    source, options = folder(tmp_path)
    with planned(Request.of([str(source)], options)).begun() as job:
        yield job


def some(unit, *keys):
    return Some(unit, [Result(key, "", SUCCESS) for key in keys])


def done(unit):
    return Done(unit, [["told"], []])


def test_results_that_come_once_more_are_told_once(job):
    told = []
    workers = Scripted(
        (0, Ready({"the model": "x"})), (0, More(True)), (0, some(0, "a", "b")), (0, More(False)), (0, Died("")),
        (0, More(True)), (0, some(0, "a")), (0, some(0, "b", "c")), (0, More(False)), (0, done(0)), (0, More(True)),
        (0, done(1)),
    )  # fmt: skip
    dispatch(job, workers, job.units[:2], lambda results: told.extend(result.key for result in results))
    assert told == ["a", "b", "c"]
    assert workers.done == [
        ("start", 0), (0, (0, False)), (0, (1, False)), ("start", 0), (0, (0, True)), (0, None), (0, (1, True)),
        "close",
    ]  # fmt: skip
    assert job.sinks[0].notes == ["told", "told"]
    with pytest.raises(CollectionError, match="the model was"):
        dispatch(job, Scripted((0, Ready({"the model": "y"}))), job.units[:1], told.extend)


def test_the_unit_of_one_that_died_goes_to_one_that_waits(job):
    workers = Scripted(
        (0, More(True)), (1, More(True)), (1, done(1)), (1, More(True)), (0, Died("")), (1, done(0)), number=2
    )  # fmt: skip
    dispatch(job, workers, job.units[:2], lambda results: None)
    assert workers.done[2:] == [(0, (0, False)), (1, (1, False)), ("start", 0), (1, (0, True)), "close"]


def test_a_unit_that_kills_is_left_when_all_else_is_done(job):
    told = [(0, More(True)), (0, Died("no memory"))] * 3 + [(0, More(True)), (0, done(1))]
    workers = Scripted(*told)
    with pytest.raises(CollectionError, match=r"images 1 to 16: 3 workers died during it \(no memory\); the rest is"):
        dispatch(job, workers, job.units[:2], lambda results: None)
    assert workers.done[-3:] == [("start", 0), (0, (1, False)), "close"]


def test_workers_that_die_before_they_begin_end_the_run(job):
    workers = Scripted(*[(0, Died("no memory"))] * 5)
    with pytest.raises(CollectionError, match=r"3 times while it started \(no memory\)"):
        dispatch(job, workers, job.units, lambda results: None)
    assert workers.done[-1] == "close"


def test_no_run_begins_before_the_workers_of_another_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("blip2.collection.journal.HANDOVER_S", 0.2)
    journal = Journal(tmp_path / "journal")
    with journal.helped((0, 1), 1), pytest.raises(CollectionError, match="another run"), journal.held():
        pass
    with (
        journal.helped((0, 4), 0), journal.held((1, 4)),  # of another part
        pytest.raises(CollectionError, match="another run"), journal.held((0, 4)),
    ):  # fmt: skip
        pass
    with journal.held():
        pass


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


SCRIPT = """
import sys
sys.path[:] = {path!r}
from tests.collection import test_engines as engines
import blip2.collection.sources.files as files
from pathlib import Path
files.UNIT_FILES = 16
place = Path({place!r})
engines.begin(place, place / "photos", {options!r}, engines.BOTH, pause_s=0.2).run()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_run_and_the_same_command_goes_on(tmp_path, kind):
    source, options = folder(tmp_path)
    script = SCRIPT.format(path=sys.path, place=str(tmp_path), options=options)
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while not list(source.rglob("*.txt")):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(kind)
    child.wait()
    before = noted(tmp_path)
    assert len(before) < NUM_PICTURES
    assert begin(tmp_path, source, options, {}).run().is_complete  # at once: it waits for workers of the other
    assert not any(alive(int(process)) for process, _ in before)
    assert not [path for path in source.rglob(".*") if path.name.endswith(".part")]
    assert Counter(key for _, key in noted(tmp_path)).total() - NUM_PICTURES <= 2 * BATCH_SIZE
