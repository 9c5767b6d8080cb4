"""Processes that fail, are killed or stopped: all of them end, one reports the error, and the next start resumes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2 import train
from blip2.disk import locked
from blip2.train.group import LAUNCHED
from tests.train.processes import in_processes
from tests.train.test_distributed import UNEVEN, assert_same_training, settings

LONG = {"checkpoint_every": 1, "evaluate_every": 1000, "optim.steps": 400}
BY_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def start(path, devices, command=None, **changes):
    """``blip2 train`` with so many processes, in a session of its own."""
    devices_of = [] if command else ["--devices", str(devices)]
    command = [*command, str(devices), "-m"] if command else [sys.executable, "-m"]
    return subprocess.Popen(
        [*command, "blip2", "train", str(path), *devices_of, *settings(changes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def children(process):
    """By rank, the processes that a launcher has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = dict(part.partition("=")[::2] for part in (folder / "environ").read_text().split("\0"))
            parent = re.search(r"PPid:\s*(\d+)", (folder / "status").read_text())[1]
        except (OSError, TypeError):
            continue
        if LAUNCHED in told and int(parent) == process.pid:
            found[int(told["RANK"])] = int(folder.name)
    return found


def wait_for(process, out, step):
    """Until that step is in the log."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and f'"step": {step},' in (out / "log.jsonl").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def end(process, timeout=100):
    out, err = process.communicate(timeout=timeout)
    lines = [line for line in err.splitlines() if line.startswith("blip2: ")]
    return process.returncode, out, lines, err


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")]


@pytest.fixture
def recipe(write_recipe, matching_model):
    path = write_recipe(1, matching_model)
    path.write_text(path.read_text().replace('features = "features"', ""))
    return path


@pytest.mark.parametrize("rank", [0, 2])
def test_one_that_is_killed_ends_all(recipe, tmp_path, rank):
    process = start(recipe, 3, **LONG)
    wait_for(process, tmp_path / "out1", 3)
    found = children(process)
    os.kill(found[rank], signal.SIGKILL)
    code, out, lines, err = end(process)
    assert code == 1 and out == "" and "Traceback" not in err
    assert lines == [
        f"blip2: process {rank} of 3 was killed by signal 9 (Killed), and the others were stopped; "
        "start the same command again to resume from the last state"
    ]
    assert not any(Path(f"/proc/{pid}").exists() for pid in found.values())


@pytest.mark.parametrize("command", [None, BY_TORCHRUN])
def test_one_that_fails_tells_why(recipe, rows, tmp_path, command):
    """An image that only the second process comes to."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    lines[0]["image"] = str(bad)
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "bad.toml"
    path.write_text(recipe.read_text().replace("[data]", '[data]\non_bad_picture = "stop"'))
    process = start(path, 2, command, **LONG)
    code, _, lines, err = end(process)
    assert code == 1
    assert len(lines) == 1 and re.match(r"blip2: process [01] of 2: .*bad\.png: ", lines[0]), err


@pytest.mark.parametrize("command", [None, BY_TORCHRUN])
def test_a_recipe_that_cannot_be_carried_out_is_told_once(recipe, tmp_path, command):
    code, _, lines, err = end(start(recipe, 2, command, **{"optim.batch_size": 9}))
    assert code == 1 and len(lines) == 1 and "there are only 8 rows; lower it" in lines[0], err


def test_one_training_at_a_time(recipe, tmp_path):
    with locked(tmp_path / "out1" / "training" / "lock"):
        code, _, lines, err = end(start(recipe, 2))
    assert code == 1 and len(lines) == 1 and "out1: another run is training there" in lines[0], err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_them_together(recipe, tmp_path, number):
    process = start(recipe, 2, **LONG | {"checkpoint_every": 1000})
    wait_for(process, tmp_path / "out1", 5)
    process.send_signal(number)
    code, out, lines, err = end(process)
    assert code == 130 and out == "" and len(lines) == 1, err
    done = int(re.match(r"blip2: stopped after step (\d+) of 400; the state is in", lines[0])[1])
    last = json.loads((tmp_path / "out1" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == done >= 5


def test_processes_end_with_the_one_that_started_them(recipe, tmp_path):
    process = start(recipe, 2, **LONG)
    wait_for(process, tmp_path / "out1", 3)
    found = children(process).values()
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def test_who_gets_no_answer_gives_up():
    processes = in_processes(2, "silent", wait=False)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and "process 0 of 2 got no answer from the others; start the same" in err
    processes[1].kill()
    processes[1].communicate()


def test_torchrun(recipe, tmp_path):
    code, out, _, err = end(start(recipe, 2, BY_TORCHRUN, **UNEVEN | {"out": "shared"}))
    assert code == 0 and out == f"{tmp_path / 'shared'}\n", err
    assert_same_training(tmp_path / "shared", train.run(recipe, overrides=UNEVEN))


@pytest.mark.parametrize("stage", [1, 2])
def test_going_on_with_another_number_of_processes(write_recipe, matching_model, opt_model, tmp_path, stage):
    """One, four, two, in parts, one of them killed each time: the losses and weights of one that was left alone."""
    path = write_recipe(stage, matching_model if stage == 1 else opt_model)
    steps = UNEVEN | {"optim.steps": 60, "evaluate_every": 20, "checkpoint_every": 3}
    chance, until = random.Random(stage), 0
    for devices, accumulate in ((1, 1), (4, 1), (2, 2)):
        until += chance.randint(4, 12)
        process = start(path, devices, **steps | {"out": "parts", "optim.accumulate": accumulate})
        wait_for(process, tmp_path / "parts", until)
        os.kill(chance.choice(list(children(process).values()) or [process.pid]), signal.SIGKILL)
        assert end(process)[0] == (1 if devices > 1 else -signal.SIGKILL)
    train.run(path, overrides=steps | {"out": "parts"})
    assert_same_training(tmp_path / "parts", train.run(path, overrides=steps | {"out": "whole"}))
