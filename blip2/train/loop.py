"""The training loop: one page that knows no stage. A stage is a function from a batch to losses.

All that is random in a step follows from the seed and the step's number, so training that was stopped goes on
as if it had not been: the state is the trained weights, the optimiser's moments, and the number of the step.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2.data import prefetch
from blip2.disk import write_text
from blip2.errors import Blip2Error, RecipeError
from blip2.finite import first_not_finite
from blip2.train.optim import build_optimizer, learning_rate, trained_parameters
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
    make_batch: Callable[[int], Any]
    losses: Callable[[Any, torch.Generator], dict[str, Tensor]]
    """By name; their sum is minimised."""
    evaluate: Callable[[], dict[str, float]] | None = None
    num_cut: Callable[[], int] = int
    """How many texts were longer than the recipe allows, so far."""
    bad_pictures: Callable[[], dict[str, str]] = dict
    """Those that could not be read so far, by path, each with what is wrong with it."""


def train(task: Task, recipe: Recipe, *, report: Report, autocast: Callable[[], AbstractContextManager]) -> None:
    """Train to the recipe's last step, from wherever the state in its folder stands.

    Raises `TrainingStopped` after SIGINT or SIGTERM, `TrainingFailed` if the loss is no number ten steps in a row or in
    none of all steps, or has run away, or if a trained weight is no number, and whatever a step raises. What was learnt
    before is saved.
    """
    folder, optim = recipe.out / "training", recipe.optim
    parameters = trained_parameters(task.model)
    optimizer = build_optimizer(parameters, optim)
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device)
    first = load_state(folder, parameters, optimizer, recipe)
    if first > optim.steps:
        raise RecipeError(
            f"optim.steps is {optim.steps}, and {folder} has done {first} steps already; raise it, or name another "
            "folder as 'out'"
        )
    log = Log(recipe.out / "log.jsonl", keep_to=first)
    meter = Meter(report, log, recipe, first)
    bad_steps, done, saved = 0, first, first
    is_whole = True

    def save() -> None:
        nonlocal saved
        with meter.paused():
            save_state(folder, parameters, optimizer, recipe, step=done)
        saved = done
        meter.say("checkpoint", done, f"saved the state of step {done}")

    def evaluate() -> None:
        if task.evaluate is not None and (done % recipe.evaluate_every == 0 or done == optim.steps):
            task.learning.eval()
            with meter.paused(), torch.no_grad(), autocast():
                meter.scores(done, task.evaluate())

    with stop_signals() as stop, log:
        try:
            if first and log.evaluated != first:  # an error came between the step and its evaluation
                evaluate()
            for step, batch in enumerate(prefetch(task.make_batch, range(first, optim.steps)), start=first):
                torch.manual_seed(recipe.seed * 1_000_003 + step)
                generator.manual_seed(recipe.seed * 1_000_003 + step)
                task.learning.train()
                rate = learning_rate(step, optim)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with autocast():
                    losses = task.losses(batch, generator)
                    loss = torch.stack([value.float() for value in losses.values()]).sum()
                is_good = math.isfinite(loss.item())
                if is_good:
                    loss.backward()
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
                        save_state(folder, parameters, optimizer, recipe, step=saved)
                    raise TrainingFailed(
                        f"no number as loss or gradient in {bad_steps} steps in a row, the last is step {done}: "
                        f"{_cause(task.model, parameters)}; {_state(folder, saved)}"
                    )
                meter.bad_pictures(done, task.bad_pictures())
                meter.add(done, losses if is_good else {}, rate, task.num_cut())
                is_due = done % recipe.checkpoint_every == 0 or done % recipe.evaluate_every == 0
                if (is_due or is_last or stop.is_set()) and first_not_finite(parameters) is not None:
                    raise TrainingFailed(f"after step {done} {_cause(task.model, parameters)}; {_state(folder, saved)}")
                evaluate()
                if done % recipe.checkpoint_every == 0 or is_last or stop.is_set():
                    save()
                if stop.is_set() and not is_last:
                    raise TrainingStopped(
                        f"stopped after step {done} of {optim.steps}; the state is in {folder}: start the same recipe "
                        "again to go on"
                    )
        except TrainingFailed:  # has saved what is worth it
            raise
        except BaseException:
            if is_whole and done > saved and first_not_finite(parameters) is None:
                with suppress(Exception):  # what went wrong first is what is told
                    save()
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


class Log:
    """One JSON object a line. What was written after the step that training goes on from is taken out."""

    def __init__(self, path: Path, keep_to: int) -> None:
        lines = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() and keep_to else []
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= keep_to]
        self.evaluated = max((json.loads(line)["step"] for line in kept if '"evaluation"' in line), default=0)
        """The step of the last evaluation in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """Of a line of the log; a line that is damaged is none of them."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


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
