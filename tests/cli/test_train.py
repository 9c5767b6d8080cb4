"""``blip2 train``: what it shows, how values are replaced, how it ends. What it does is tested in tests/train."""

from pathlib import Path

import pytest

from blip2.cli.train import line_of, time_of
from blip2.errors import RecipeError
from blip2.train import OtherProcessFailed, Progress, TrainingStopped

REPORTS = [
    Progress("features", 50, 100, images_per_s=12.5, left_s=4),
    Progress("train", 10, 20, {"itc": 1.25, "itm": 0.5}, {}, 1e-4, 640, 75),
    Progress("evaluation", 20, 20, scores={"accuracy": 0.875}),
    Progress("checkpoint", 20, 20, message="saved the state after step 20"),
]


@pytest.fixture
def calls(monkeypatch):
    """What `blip2.train.run` was given; it reports and gives a folder."""
    given = []

    def run(path, *, report, overrides):
        given.append((path, overrides))
        for progress in REPORTS:
            report(progress)
        return Path("runs/one")

    monkeypatch.setattr("blip2.train.run", run)
    return given


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("stage = 1\n")
    return path


def test_lines_on_standard_error_and_the_folder_on_standard_output(run, calls, recipe):
    result = run("train", recipe)
    assert (result.exit_code, result.stdout) == (0, "runs/one\n")
    assert result.stderr.splitlines() == [
        "features 50/100  12 images/s  0:04 left",
        "train 10/20  itc 1.25  itm 0.5  lr 1.00e-04  640 images/s  1:15 left",
        "evaluation 20/20  accuracy 0.875",
        "checkpoint 20/20  saved the state after step 20",
    ]
    assert calls == [(recipe, {})]


def test_values_are_replaced(run, calls, recipe):
    given = ["optim.steps=100", "optim.peak_lr = 5e-5", "out=runs/second", 'start="a=b"', "data.rows=['x.jsonl']"]
    run("train", recipe, *(part for change in given for part in ("--set", change)))
    [(_, overrides)] = calls
    assert overrides == {
        "optim.steps": 100, "optim.peak_lr": 5e-5, "out": "runs/second", "start": "a=b", "data.rows": ["x.jsonl"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code"), [(TrainingStopped("stopped after step 5"), 130), (RecipeError("optim: is missing"), 1)]
)
def test_how_it_ends(run, monkeypatch, recipe, error, code):
    def fail(path, **others):
        raise error

    monkeypatch.setattr("blip2.train.run", fail)
    result = run("train", recipe)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"blip2: {error}\n")


@pytest.mark.parametrize(("arguments", "words"), [(["no.toml"], "does not exist"), (["--set", "steps"], "NAME=VALUE")])
def test_wrong_use(run, recipe, arguments, words):
    result = run("train", *arguments, *([recipe] if arguments[0] == "--set" else []))
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1


def as_one_of_several(monkeypatch, **changes):
    environment = {"world_size": 2, "rank": 1, "master_addr": "localhost", "master_port": 1} | changes
    for name, value in environment.items():
        monkeypatch.setenv(name.upper(), str(value))


@pytest.mark.parametrize("changes", [{"rank": 2}, {"rank": ""}, {"world_size": "two"}, {"master_addr": ""}])
def test_half_an_environment(run, calls, recipe, monkeypatch, changes):
    as_one_of_several(monkeypatch, **changes)
    result = run("train", recipe)
    assert result.exit_code == 1 and calls == []
    assert "start with torchrun or with --devices, or unset WORLD_SIZE" in result.stderr
    assert result.stderr.count("\n") == 1


def test_several_devices(run, calls, recipe, monkeypatch):
    given = []
    monkeypatch.setattr("blip2.train.load_recipe", lambda *_: None)
    monkeypatch.setattr("blip2.train.launch.launch", lambda *arguments: given.append(arguments) or 3)
    assert run("train", recipe, "--devices", 4, "--set", "out=a b").exit_code == 3
    assert given == [(["train", str(recipe), "--set=out=a b"], 4)] and calls == []
    as_one_of_several(monkeypatch, rank=0)
    result = run("train", recipe, "--devices", 4)
    assert result.exit_code == 2 and "torchrun has already started the processes" in result.stderr


def test_one_of_several_is_silent_but_the_first(run, calls, recipe, monkeypatch):
    as_one_of_several(monkeypatch, rank=1)
    result = run("train", recipe)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "") and len(calls) == 1


@pytest.mark.parametrize(("cause", "code"), [(TrainingStopped("after step 5"), 130), (RecipeError("wrong"), 1)])
def test_what_another_process_tells_is_not_told_twice(run, monkeypatch, recipe, cause, code):
    def fail(path, **others):
        raise OtherProcessFailed("process 0 reports the error") from cause

    monkeypatch.setattr("blip2.train.run", fail)
    result = run("train", recipe)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "")


def test_a_real_recipe_is_read(run, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("stage = 3\n")
    result = run("train", path)
    assert result.exit_code == 1
    assert str(path) in result.stderr and result.stderr.count("\n") == 1


def test_times():
    assert [time_of(seconds) for seconds in (0, 59.6, 75, 4000)] == ["0:00", "1:00", "1:15", "1:06:40"]
    assert line_of(Progress("train", 1, 2)) == ""
