"""Trainings from shards that are killed again and again, and go on with another number of processes each time."""

import os
import random
import signal
from pathlib import Path

import pytest

from blip2 import train
from blip2.errors import Blip2Error
from tests.collection.written import shards
from tests.train.test_distributed import assert_same_training
from tests.train.test_processes import children, end, start, wait_for
from tests.train.written import write

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")

STEPS = {"log_every": 1, "checkpoint_every": 3, "optim.batch_size": 7, "optim.peak_lr": 1e-4, "optim.ema": 0.9}


def kill_again_and_again(path, number, devices, steps, seed):
    """One of the processes each time, at a step that chance chooses; how often that came before the end."""
    chance, until, kills = random.Random(seed), 0, 0
    for turn in range(number):
        process = start(path, devices[turn % len(devices)], **STEPS | {"optim.steps": steps, "out": "parts"})
        until += chance.randint(2, 6)
        wait_for(process, path.parent / "parts", until)
        until = max(until, last_step(path.parent / "parts"))
        found = list(children(process).values()) or [process.pid]
        if process.poll() is None:
            os.kill(chance.choice(found), signal.SIGKILL)
            kills += 1
        code, _, _, told = end(process)
        assert code in (0, 1, -signal.SIGKILL), told
    return kills


def last_step(out):
    return max(int(line.split('"step": ')[1].split(",")[0]) for line in (out / "log.jsonl").read_text().splitlines())


def check(tmp_path, model, stage, number, devices, steps):
    shards(tmp_path / "s", [5, 7, 6])
    data = '[data]\nsources = "s/{00000..00002}.tar"\nmax_prompt_tokens = 64'
    path = write(tmp_path / "recipe.toml", data, model, stage)
    assert kill_again_and_again(path, number, devices, steps, seed=stage) >= number - 1
    whole = STEPS | {"optim.steps": steps}
    train.run(path, overrides=whole | {"out": "parts"})
    assert_same_training(tmp_path / "parts", train.run(path, overrides=whole | {"out": "whole"}))


def test_two_kills(tmp_path, matching_model):
    check(tmp_path, matching_model, 1, 2, (2, 1), 40)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2])
def test_ten_kills(tmp_path, matching_model, opt_model, stage):
    """One, four, two, one, ... processes: order, negatives, losses and weights are those of one that was left alone."""
    check(tmp_path, matching_model if stage == 1 else opt_model, stage, 10, (1, 4, 2), 200)


def test_another_order_is_noticed(tmp_path, matching_model):
    """What the comparison above sees: rows in another order give other losses."""
    shards(tmp_path / "s", [5, 7, 6])
    path = write(tmp_path / "recipe.toml", 'data = "s/{00000..00002}.tar"', matching_model)
    few = STEPS | {"optim.steps": 4}
    one = train.run(path, overrides=few | {"out": "one"})
    with pytest.raises(AssertionError):
        assert_same_training(train.run(path, overrides=few | {"out": "two", "seed": 1}), one)
    with pytest.raises(Blip2Error):
        train.run(path, overrides=few | {"out": "one", "seed": 1, "optim.steps": 5})
