"""Who is told how a training goes: the same numbers as the log, from the step that it goes on from."""

import json
import math
import sys
from dataclasses import replace

import pytest

from blip2 import train as training
from blip2.errors import RecipeError
from blip2.train.recipes import TrackRecipe
from tests.train.test_loop import recipe, run, task


def tracked(out, name, **optim):
    return replace(recipe(out, **optim), track=TrackRecipe(to=(name,), project="dogs"))


class Fake:
    """Stands for trackio, and for wandb and its run."""

    def __init__(self, breaks_at=math.inf):
        self.begun, self.told, self.is_over, self.breaks_at = [], [], 0, breaks_at

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, *names, **options):
        pass

    def log(self, values, step=None):
        if len(self.told) == self.breaks_at:
            raise ConnectionError("gone")
        self.told.append((values.pop("trainer/step", step), values))

    def finish(self):
        self.is_over += 1


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_libraries_are_told_what_is_logged(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, fake := Fake())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(task(evaluate=lambda: {"score": 0.5}), tracked(tmp_path / "out", name))
    assert fake.is_over == 1
    [begun] = fake.begun
    assert begun["project"] == "dogs" and begun["name"] == "out" and begun["resume"] == "allow"
    assert name != "wandb" or begun["mode"] == "offline"
    logged = {line["step"]: line["square"] for line in lines(tmp_path / "out") if "square" in line}
    assert {step: values["train/square"] for step, values in fake.told if "train/square" in values} == logged
    assert [step for step, values in fake.told if "evaluation/score" in values] == [6, 12]


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_one_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", fake := Fake(breaks_at=3))
    seen = []
    run(task(), tracked(tmp_path / "out", "trackio"), seen.append)
    assert [step for step, _ in fake.told] == [1, 2, 3] and fake.is_over == 0
    [told] = [progress.message for progress in seen if "trackio" in progress.message]
    assert told == "trackio failed and is no longer used (ConnectionError: gone); log.jsonl has everything"
    assert len(lines(tmp_path / "out")) == 12


def test_tensorboard(tmp_path):
    """The real one: what was written after the step that a training goes on from is gone."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    run(task(evaluate=lambda: {"score": 0.5}), tracked(out, "tensorboard", steps=7))
    run(task(evaluate=lambda: {"score": 0.5}), tracked(out, "tensorboard"))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/square")] == list(range(1, 13))
    logged = [line["square"] for line in lines(out) if "square" in line]
    assert [event.value for event in events.Scalars("train/square")] == pytest.approx(logged)
    assert [event.step for event in events.Scalars("evaluation/score")] == [6, 7, 12]


def test_what_is_not_installed_is_named_before_anything_is_computed(write_recipe, opt_model, monkeypatch):
    monkeypatch.setattr("blip2.train.trackers.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"track\.to: wandb is not installed; .*install.*wandb.*, or remove it"):
        training.run(write_recipe(2, opt_model), overrides={"track.to": "wandb"})


def test_what_is_no_tracker(write_recipe, opt_model):
    with pytest.raises(RecipeError, match=r"track\.to: names 'paper'; there are tensorboard, trackio, wandb"):
        training.run(write_recipe(2, opt_model), overrides={"track.to": "paper"})

