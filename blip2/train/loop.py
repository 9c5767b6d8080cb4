"""The training loop: one page that knows no stage. A stage is a function from a batch to losses.

All that is random in a step follows from the seed and the step's number, so training that was stopped goes on
as if it had not been: the state is the trained weights, the optimiser's moments, and the number of the step.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2.data import prefetch
from blip2.errors import Blip2Error, RecipeError
from blip2.finite import first_not_finite
from blip2.train.group import Group, Step, check_alike, parts_of
from blip2.train.log import Log
from blip2.train.optim import build_optimizer, learning_rate, set_rate, sum_gradients, trained_parameters
from blip2.train.recipes import Recipe
from blip2.train.state import load_state, save_state

MOST_BAD_STEPS = 10
FAR, FACTOR, MOST_FAR_REPORTS = 3.0, 2.0, 3
"""A loss has run away if it is so much, and so many times, above that of the first report, so many reports in a row."""
REMEDY = "lower optim.peak_lr or set optim.clip, and begin anew with another 'out'"


class TrainingStopped(Blip2Error):
    """Somebody stopped the training; the message says how to go on."""


class TrainingFailed(Blip2Error):
    """The loss is no number any more, or has run away."""


@dataclass(frozen=True)
class Progress:
    """What is going on. ``phase`` "features" counts pictures in ``step`` of ``steps``, the others training steps.

    ``losses`` are means since the last report, ``scores`` what an evaluation found, ``message`` is for people.
    """

    phase: str
    step: int
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    images_per_s: float = 0.0
    left_s: float = math.nan
    message: str = ""


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Task:
    """All that the loop needs of a stage. Batches are made in another thread."""

    model: nn.Module
    learning: nn.Module
    """The part in training mode (dropout); all else stays as it evaluates."""
    make_batch: Callable[[int, range], Any]
    """Of a step, these rows of the global batch."""
    backward: Callable[[Sequence[Any], Step], dict[str, Tensor]]
    """This process's share of each loss, by name, from the parts of its share of the batch. Their sum is minimised: its
    share of the gradient is added to ``.grad``. All shares together are those of the global batch."""
    evaluate: Callable[[], dict[str, float]] | None = None
    num_cut: Callable[[], int] = int
    """How many texts were longer than the recipe allows, so far."""
    bad_pictures: Callable[[], dict[str, str]] = dict
    """Those that could not be read so far, by path, each with what is wrong with it."""
    rate_shares: Mapping[str, float] = field(default_factory=dict)
    """Of parameters, by name, that learn at a part of the learning rate."""


def train(
    task: Task,
    recipe: Recipe,
    *,
    report: Report,
    autocast: Callable[[], AbstractContextManager],
    group: Group | None = None,
) -> None:
    """Train to the recipe's last step, from wherever the state in its folder stands.

    Every process of the group does the same steps with the same weights; the first alone writes and reports.
    Raises `TrainingStopped` after SIGINT or SIGTERM, `TrainingFailed` if the loss is no number ten steps in a row or in
    none of all steps, or has run away, or if a trained weight is no number, and whatever a step raises. What was learnt
    before is saved.
    """
    group = group or Group()
    folder, optim = recipe.out / "training", recipe.optim
    parameters = trained_parameters(task.model)
    optimizer = build_optimizer(parameters, optim, task.rate_shares)
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device)
    first = load_state(folder, parameters, optimizer, recipe)
    check_alike(group, first, parameters)
    if first > optim.steps:
        raise RecipeError(
            f"optim.steps is {optim.steps}, and {folder} has done {first} steps already; raise it, or name another "
            "folder as 'out'"
        )
    log = Log(recipe.out / "log.jsonl" if group.is_first else None, keep_to=first)
    meter = Meter(report, log, recipe, first)
    bad_steps, done, saved, num_bad = 0, first, first, 0.0
    is_whole = True
    parts = parts_of(group.share(optim.batch_size), optim.accumulate)

    def write() -> None:
        nonlocal saved
        if group.is_first:
            with meter.paused():
                save_state(folder, parameters, optimizer, recipe, step=done)
        saved = done
        meter.say("checkpoint", done, f"saved the state of step {done}")

    def save() -> None:
        with group.together():
            write()

    def evaluate() -> None:
        if task.evaluate is not None and (done % recipe.evaluate_every == 0 or done == optim.steps):
            task.learning.eval()
            with meter.paused(), torch.no_grad(), autocast():
                meter.scores(done, task.evaluate())

    def check() -> None:
        if first_not_finite(parameters) is not None:
            raise TrainingFailed(f"after step {done} {_cause(task.model, parameters)}; {_state(folder, saved)}")

    def make(step: int) -> list[Any]:
        return [task.make_batch(step, places) for places in parts]

    with stop_signals() as stop, log:
        try:
            if first and group.most(log.evaluated) != first:  # an error came between the step and its evaluation
                evaluate()
            batches = prefetch(make, range(first, optim.steps))
            for step in range(first, optim.steps):
                with group.together():
                    batch = next(batches)
                seed = recipe.seed * 1_000_003 + step
                torch.manual_seed(seed)
                task.learning.train()
                rate = learning_rate(step, optim)
                set_rate(optimizer, rate)
                shares = task.backward(
                    batch, Step(seed, optim.batch_size, autocast, generator.manual_seed(seed), group)
                )
                counts = [torch.tensor(float(n), device=device) for n in (len(task.bad_pictures()), task.num_cut())]
                told = torch.stack([*(share.float() for share in shares.values()), *counts])
                sum_gradients(group, parameters, told)
                losses = dict(zip(shares, told, strict=False))
                is_good = math.isfinite(told[: len(losses)].sum().item())
                if is_good:
                    norm = nn.utils.clip_grad_norm_(parameters.values(), optim.clip or math.inf)
                    is_good = math.isfinite(norm.item())
                is_whole = False
                if is_good:
                    optimizer.step()
                done, is_whole = step + 1, True
                optimizer.zero_grad(set_to_none=True)
                bad_steps = 0 if is_good else bad_steps + 1
                if not is_good:
                    meter.say("train", done, f"skipped step {done}: the loss or its gradient is no number")
                is_last = done == optim.steps
                if bad_steps == MOST_BAD_STEPS or (is_last and bad_steps == done):
                    if done - bad_steps > saved and first_not_finite(parameters) is None:
                        saved = done - bad_steps  # nothing was learnt since
                        if group.is_first:
                            save_state(folder, parameters, optimizer, recipe, step=saved)
                    raise TrainingFailed(
                        f"no number as loss or gradient in {bad_steps} steps in a row, the last is step {done}: "
                        f"{_cause(task.model, parameters)}; {_state(folder, saved)}"
                    )
                if told[-2].item() != num_bad:
                    num_bad = told[-2].item()
                    for found in group.objects(task.bad_pictures()):
                        meter.bad_pictures(done, found)
                meter.add(done, losses if is_good else {}, rate, int(told[-1]))
                if done % recipe.checkpoint_every == 0 or done % recipe.evaluate_every == 0 or is_last:
                    check()
                evaluate()
                is_stopped = group.is_any(stop.is_set())
                if is_stopped:
                    check()
                if done % recipe.checkpoint_every == 0 or is_last or is_stopped:
                    save()
                if is_stopped and not is_last:
                    raise TrainingStopped(
                        f"stopped after step {done} of {optim.steps}; the state is in {folder}: start the same recipe "
                        "again to go on"
                    )
        except TrainingFailed:  # has saved what is worth it
            raise
        except BaseException:
            if group.is_first and is_whole and done > saved and first_not_finite(parameters) is None:
                with suppress(Exception):  # what went wrong first is what is told
                    write()
            raise
    task.model.eval()


def _cause(model: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    """Why there are no numbers, most likely, and what to do."""
    if (name := first_not_finite(parameters)) is not None:
        return f"{name}, which is trained, is NaN or infinite; {REMEDY}"
    if (name := first_not_finite(dict(model.named_parameters()))) is not None:
        return f"{name}, which is not trained, is NaN or infinite; start from another model"
    return f"no weight is NaN or infinite, so numbers overflow; {REMEDY}, or set precision to fp32"


def _state(folder: Path, step: int) -> str:
    return f"the state of step {step} is in {folder}" if step else "no state was saved"


class Meter:
    """Means, rate and time left, reported and logged every so many steps."""

    def __init__(self, report: Report, log: Log, recipe: Recipe, first: int) -> None:
        self._report, self._log, self._recipe = report, log, recipe
        self._sums: dict[str, Tensor] = {}
        self._count, self._last, self._started = 0, first, time.perf_counter()
        self._is_cut_told = False
        self._bad: set[str] = set()
        self._first_loss, self._far_reports = math.inf, 0

    def add(self, done: int, losses: dict[str, Tensor], rate: float, num_cut: int) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._count += bool(losses)
        if done % self._recipe.log_every and done != self._recipe.optim.steps:
            return
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        steps, now = self._recipe.optim.steps, time.perf_counter()
        steps_per_s = (done - self._last) / (now - self._started)
        images_per_s, left_s = steps_per_s * self._recipe.optim.batch_size, (steps - done) / steps_per_s
        values = {"learning_rate": rate, "images_per_s": round(images_per_s, 2), "cut_texts": num_cut,
                  "bad_pictures": len(self._bad)}  # fmt: skip
        self._log.write({"step": done, **means, **values})
        message = ""
        if num_cut and not self._is_cut_told:
            message, self._is_cut_told = "some texts are longer than the recipe allows, and are cut", True
        self._report(Progress("train", done, steps, means, {}, rate, images_per_s, left_s, message))
        self._sums, self._count, self._last, self._started = {}, 0, done, now
        if means:
            self._check_distance(done, sum(means.values()))

    def _check_distance(self, done: int, loss: float) -> None:
        """Raises TrainingFailed for a loss that has been far above the first one for some reports."""
        first = self._first_loss = loss if self._first_loss == math.inf else self._first_loss
        self._far_reports = self._far_reports + 1 if loss > max(first + FAR, FACTOR * first) else 0
        if self._far_reports == MOST_FAR_REPORTS:
            raise TrainingFailed(
                f"the loss has run away: {first:.3g} at first, {loss:.3g} at step {done}; {REMEDY}"
            )

    def bad_pictures(self, done: int, found: dict[str, str]) -> None:
        """Tell and log those that are new."""
        for path in found.keys() - self._bad:
            self._log.write({"step": done, "bad_picture": path, "problem": found[path]})
            self.say("train", done, f"passed over: {found[path]}")
        self._bad |= found.keys()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes its time without being training."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def scores(self, done: int, found: dict[str, float]) -> None:
        self._log.write({"step": done, "evaluation": found})
        self._report(Progress("evaluation", done, self._recipe.optim.steps, scores=found))

    def say(self, phase: str, done: int, message: str) -> None:
        self._report(Progress(phase, done, self._recipe.optim.steps, message=message))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one ends the process as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def autocast_for(precision: str, device: torch.device) -> tuple[Callable[[], AbstractContextManager], torch.dtype]:
    """How to compute, and how the frozen parts are kept; what learns is always kept in fp32.

    "auto" is bf16 where the machine has it in hardware. On a CPU the frozen parts stay in fp32 all the same:
    they are read once for features, and small enough where a CPU can train.
    """
    if precision == "fp32" or (precision == "auto" and not _has_bf16(device)):
        return nullcontext, torch.float32
    frozen_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return lambda: torch.autocast(device.type, torch.bfloat16), frozen_dtype


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
