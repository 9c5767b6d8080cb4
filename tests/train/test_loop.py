"""The loop, with a stage that is one vector: bad steps, signals, the log."""

import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blip2 import tensorfile
from blip2.errors import RecipeError
from blip2.train import TrainingFailed, TrainingStopped
from blip2.train.loop import Task, train
from blip2.train.recipes import DataRecipe, OptimRecipe, Recipe
from blip2.train.state import ROWS, save_state


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.dropout = nn.Dropout(0.5)


def recipe(out, **optim):
    return Recipe(
        stage=1,
        start="",
        out=out,
        data=DataRecipe(rows=(Path("rows"),)),
        optim=OptimRecipe(**({"steps": 12, "batch_size": 2, "warmup_steps": 3, "peak_lr": 0.1} | optim)),
        log_every=1,
        checkpoint_every=5,
        evaluate_every=6,
    )


def task(model=None, factor=lambda step: 1.0, evaluate=None):
    """A stage whose loss has all that may go wrong when resuming: dropout, a draw, the data of the step."""
    model = model or Vector()

    def square(step, generator):
        noise = torch.rand(3, 4, generator=generator)
        return ((model.dropout(model.weight) - noise) ** 2).sum() * factor(step)

    return Task(model, model, lambda step, places: step, backward_of(square), evaluate)


def backward_of(loss_of):
    """The loss of a step's number, whatever the parts of its batch."""

    def backward(batch, step):
        loss = loss_of(batch[0], step.generator)
        loss.backward()
        return {"square": loss.detach()}

    return backward


def losses_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["square"] for line in lines if "square" in line}


def run(task, recipe, report=lambda progress: None):
    train(task, recipe, report=report, autocast=nullcontext)


def test_resuming_is_as_if_nothing_had_happened(tmp_path):
    whole, parts = task(), task()
    run(whole, recipe(tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 8:
            raise Stop

    with pytest.raises(Stop):
        run(parts, recipe(tmp_path / "parts"), stop)
    assert list(losses_of(tmp_path / "parts")) == list(range(1, 9))
    again = task()
    seen = []
    run(again, recipe(tmp_path / "parts"), seen.append)
    assert seen[0].step == 9  # an error saves the state before it ends the run
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert torch.equal(again.model.weight, whole.model.weight)


def averaged(steps, decay):
    """The weights of each step, and their average, of a training that keeps none."""
    model, seen = Vector(), []
    told = task(model)

    def backward(batch, step):
        seen.append(model.weight.detach().clone())
        return told.backward(batch, step)

    return model, seen, replace(told, backward=backward)


def test_the_average_is_evaluated_exported_and_resumed(tmp_path):
    model, seen, told = averaged(12, 0.9)
    run(told, recipe(tmp_path / "plain"))
    seen.append(model.weight.detach().clone())
    averages = seen[:1]
    for step, weight in enumerate(seen[1:]):
        averages.append(averages[-1].lerp(weight, 1 - min(0.9, (1 + step) / (10 + step))))

    averaging, evaluated = Vector(), []

    def evaluate():
        evaluated.append(averaging.weight.detach().clone())
        return {"score": 0.5}

    whole = task(averaging, evaluate=evaluate)
    run(whole, recipe(tmp_path / "whole", ema=0.9))
    assert torch.allclose(evaluated[0], averages[6], atol=1e-6)
    assert torch.allclose(evaluated[1], averages[12], atol=1e-6)
    assert torch.equal(averaging.weight, evaluated[1]), "what is left in the model is what was evaluated"
    state = load_file(tmp_path / "whole" / "training" / "state.safetensors")
    assert torch.equal(state["model.weight"], model.weight), "it learns as without an average"
    assert torch.equal(state["average.weight"], averaging.weight)

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 8:
            raise Stop

    with pytest.raises(Stop):
        run(task(), recipe(tmp_path / "parts", ema=0.9), stop)
    again = task()
    run(again, recipe(tmp_path / "parts", ema=0.9))
    assert torch.equal(again.model.weight, averaging.weight)
    with pytest.raises(RecipeError, match=r"saved with optim.ema = 0.9, but the recipe has 0.5"):
        run(task(), recipe(tmp_path / "parts", ema=0.5))


def test_a_finished_training_has_nothing_to_do(tmp_path):
    run(task(), recipe(tmp_path))
    seen = []
    run(task(), recipe(tmp_path), seen.append)
    assert seen == []


def test_another_recipe_does_not_go_on(tmp_path):
    run(task(), recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"saved with optim.peak_lr = 0.1, but the recipe has 0.2"):
        run(task(), recipe(tmp_path, peak_lr=0.2))


def test_other_rows_under_the_same_name_do_not_go_on(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    run(task(), replace(recipe(tmp_path), data=DataRecipe(rows=(rows,))))
    os.utime(rows, ns=(1, 1))  # touched only
    run(task(), replace(recipe(tmp_path), data=DataRecipe(rows=(rows,))))
    rows.write_text("{} \n")
    with pytest.raises(RecipeError, match=r"state\.safetensors: was saved when data\.rows had other rows"):
        run(task(), replace(recipe(tmp_path), data=DataRecipe(rows=(rows,))))


def test_a_state_of_an_earlier_version_goes_on(tmp_path):
    """Without a checksum, and without what was in data.rows and what recipes had not."""
    whole, parts = task(), task()
    run(whole, recipe(tmp_path / "whole"))
    run(parts, recipe(tmp_path / "parts", steps=12))
    path = tmp_path / "parts" / "training" / "state.safetensors"
    tensors, about = tensorfile.load(path)
    facts = json.loads(about["recipe"])
    del facts[ROWS], facts["optim.ema"]
    save_file(tensors, path, {"step": about["step"], "recipe": json.dumps(facts)})
    again = task()
    run(again, recipe(tmp_path / "parts"))
    assert torch.equal(again.model.weight, whole.model.weight)


def test_a_state_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "training").write_text("in the way")
    with pytest.raises(RecipeError, match=r"state\.safetensors: cannot be written .*free some space"):
        save_state(tmp_path / "training", {}, None, recipe(tmp_path), step=1)


def test_a_damaged_log_does_not_stop_a_training(tmp_path):
    run(task(), recipe(tmp_path, steps=5))
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 2', b'"st\xffp": 2', 1))
    run(task(), recipe(tmp_path, steps=5))
    assert list(losses_of(tmp_path)) == [1, 3, 4, 5]


def test_a_damaged_state_is_named(tmp_path):
    run(task(), recipe(tmp_path))
    (tmp_path / "training" / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RecipeError, match=r"state\.safetensors: is damaged"):
        run(task(), recipe(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    before = signal.getsignal(number)

    def interrupt(progress):
        if progress.step == 7 and progress.losses:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingStopped, match="stopped after step 7 of 12") as raised:
        run(task(), recipe(tmp_path), interrupt)
    assert "\n" not in str(raised.value)
    assert signal.getsignal(number) == before
    seen = []
    run(task(), recipe(tmp_path), seen.append)
    assert seen[0].step == 8


@pytest.mark.parametrize("where", ["make_batch", "backward", "evaluate"])
def test_the_state_is_saved_before_an_error_ends_the_run(tmp_path, where):
    """An image, memory, an evaluation: whatever fails once six steps are done."""
    is_broken = True

    def training():
        done = task(evaluate=lambda: {"score": 0.5})

        def fail(step, *arguments):
            if is_broken and step in (6, [6]):
                raise MemoryError("no more")
            return getattr(done, where)(step, *arguments) if where != "evaluate" else {"score": 0.5}

        return replace(done, **{where: fail if where != "evaluate" else lambda: fail(6)})

    seen = []
    with pytest.raises(MemoryError, match="no more"):
        run(training(), recipe(tmp_path), seen.append)
    assert seen[-1].message == "saved the state after step 6"
    is_broken, seen = False, []
    run(training(), recipe(tmp_path), seen.append)
    assert [(p.phase, p.step) for p in seen if p.losses or p.scores][:2] == (
        [("evaluation", 6), ("train", 7)] if where == "evaluate" else [("train", 7), ("train", 8)]
    )
    whole = task()
    run(whole, recipe(tmp_path / "whole"))
    assert losses_of(tmp_path) == losses_of(tmp_path / "whole")


def test_a_bad_step_is_skipped_and_told(tmp_path):
    seen = []
    model = Vector()
    before = []

    def factor(step):
        if step in (3, 4):
            before.append(model.weight.detach().clone())
        return math.nan if step == 3 else 1.0

    run(task(model, factor), recipe(tmp_path), seen.append)
    assert torch.equal(*before)
    assert [p.message for p in seen if "skipped" in p.message] == [
        "skipped step 4: its loss or gradient is NaN or infinite"
    ]
    assert sorted(losses_of(tmp_path)) == [step for step in range(1, 13) if step != 4]


def test_ten_bad_steps_end_it(tmp_path):
    model = Vector()
    with pytest.raises(TrainingFailed, match="10 steps in a row, the last is step 12") as raised:
        run(task(model, lambda step: math.inf if step > 1 else 1.0), recipe(tmp_path))
    assert "\n" not in str(raised.value)
    assert model.weight.isfinite().all()
    assert "numbers overflow; lower optim.peak_lr" in str(raised.value)
    # What was learnt before is not lost: that of step 10 was due, and there is nothing newer.
    assert f"the state after step 10 is in {tmp_path / 'training'}" in str(raised.value)
    assert torch.equal(load_file(tmp_path / "training" / "state.safetensors")["model.weight"], model.weight)


@pytest.mark.parametrize(
    ("factors", "end"), [([1, 1, 9, 9, 9], 5), ([1, 9, 9, 1, 9, 9, 1], None), ([1, 1.2, 1.3, 1.4, 1.4], None)]
)
def test_a_loss_that_has_run_away_ends_it(tmp_path, factors, end):
    """It is far above the first one three reports in a row; without learning, since that would change it, too."""
    model = Vector()
    model.dropout.p = 0.0
    made = replace(recipe(tmp_path, peak_lr=0.0, steps=len(factors)), checkpoint_every=1)
    told = task(model, lambda step: float(factors[step]))
    if end is None:
        run(told, made)
        return
    problem = rf"the loss diverges: \S+ at first, \S+ at step {end}; lower optim\.peak_lr"
    with pytest.raises(TrainingFailed, match=problem):
        run(told, made)
    assert list(losses_of(tmp_path)) == list(range(1, end + 1)), "the log has what was seen"


def test_a_loss_that_runs_away_after_going_on_is_judged_by_the_first_of_all(tmp_path):
    """Also if it is far from the start at each step of this run."""
    def training(factors):
        model = Vector()
        model.dropout.p = 0.0
        return task(model, lambda step: float(factors[step])), recipe(tmp_path, peak_lr=0.0, steps=len(factors))

    run(*training([1, 1, 1, 1, 9]))
    with pytest.raises(TrainingFailed, match=r"the loss diverges: \S+ at first, \S+ at step 7; lower"):
        run(*training([1, 1, 1, 1, 9, 9, 9, 9]))


def test_what_was_learnt_before_bad_steps_is_saved(tmp_path):
    model = Vector()
    with pytest.raises(TrainingFailed, match=r"the last is step 13: .*; the state after step 3 is in"):
        run(
            task(model, lambda step: math.nan if step > 2 else 1.0),
            replace(recipe(tmp_path, steps=20), checkpoint_every=100),
        )
    assert torch.equal(load_file(tmp_path / "training" / "state.safetensors")["model.weight"], model.weight)


def test_a_trained_weight_that_is_no_number_ends_it_and_is_not_saved(tmp_path):
    model = Vector()

    def factor(step):
        if step == 6:
            with torch.no_grad():
                model.weight[1, 2] = math.nan
        return 1.0

    with pytest.raises(TrainingFailed, match="after step 10 the trained weight weight is NaN or infinite; lower") as it:
        run(task(model, factor), recipe(tmp_path))
    assert f"the state after step 5 is in {tmp_path / 'training'}" in str(it.value)
    assert load_file(tmp_path / "training" / "state.safetensors")["model.weight"].isfinite().all()


def test_weights_of_the_start_that_are_no_numbers_are_named(tmp_path):
    model = Vector()
    model.frozen[1] = math.inf
    with pytest.raises(TrainingFailed, match="the frozen weight frozen is NaN or infinite; start from"):
        run(task(model, lambda step: math.nan), recipe(tmp_path))


def test_an_infinite_gradient_is_a_bad_step(tmp_path):
    model = Vector()

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            return torch.full((3, 4), math.inf)

    seen = []
    with pytest.raises(TrainingFailed, match="in 2 steps in a row, the last is step 2: no weight is NaN"):
        run(
            Task(model, model, lambda *_: 0, backward_of(lambda *_: Explode.apply(model.weight))),
            recipe(tmp_path, steps=2),
            seen.append,
        )
    assert "skipped step 1" in seen[0].message
    assert torch.equal(model.weight, torch.ones(3, 4))


def test_what_is_measured(tmp_path):
    """Means over the steps between two reports; the share of a device's peak once arithmetic is known."""
    seen = []
    measured = replace(
        task(factor=lambda step: math.nan if step == 1 else 1.0),
        flops=lambda part: 1e6, num_tokens=lambda part: 7,
    )  # fmt: skip
    run(measured, replace(recipe(tmp_path, steps=8), log_every=4), seen.append)
    first, second = [progress.measures for progress in seen if progress.losses]
    assert first["skipped"] == 0.25 and second["skipped"] == 0
    assert all(found["gradient_norm"] > 0 and found["peak_memory_mb"] > 10 for found in (first, second))
    assert all(found["tokens_per_s"] > 0 and 0 < found["mfu"] < 1 for found in (first, second))
    told = [progress.message for progress in seen if progress.losses and progress.message]
    assert len(told) == 1 and "mfu is relative to" in told[0] and "the best of 5 products" in told[0]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "mfu" in line] == [4, 8]
    assert [line["mfu_of"] for line in lines if "mfu_of" in line] == told


def test_clipping(tmp_path):
    free, clipped = task(), task()
    run(free, recipe(tmp_path / "free", steps=3))
    run(clipped, recipe(tmp_path / "clipped", steps=3, clip=1e-9, weight_decay=0))
    assert not torch.equal(free.model.weight, clipped.model.weight)


def test_evaluation_and_progress(tmp_path):
    seen, modes = [], []
    model = Vector()

    def evaluate():
        modes.append((model.training, torch.is_grad_enabled()))
        return {"score": 0.5}

    run(task(model, evaluate=evaluate), recipe(tmp_path), seen.append)
    assert modes == [(False, False)] * 2
    found = [(p.step, p.scores) for p in seen if p.phase == "evaluation"]
    assert found == [(6, {"score": 0.5}), (12, {"score": 0.5})]
    trained = [p for p in seen if p.phase == "train"]
    assert [p.step for p in trained] == list(range(1, 13))
    assert all(p.images_per_s > 0 and p.steps == 12 and p.losses for p in trained)
    assert trained[-1].left_s == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"step": 6, "evaluation": {"score": 0.5}} in lines
    assert lines[0].keys() >= {"step", "square", "learning_rate", "images_per_s"}


def test_frozen_weights_are_not_part_of_the_state(tmp_path):
    from safetensors import safe_open

    run(task(), recipe(tmp_path))
    with safe_open(tmp_path / "training" / "state.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {f"{part}.weight" for part in ("model", "exp_avg", "exp_avg_sq", "updates")}
