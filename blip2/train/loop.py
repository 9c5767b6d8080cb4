"""The training loop, independent of the stage. A stage is a function from a batch to losses.

All randomness of a step follows from the seed and the step number, so a resumed training gives the same result as an
uninterrupted one. The state consists of the trained weights, the optimiser's moments and the step number.
"""

from __future__ import annotations

import math
import signal
import threading
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
from blip2.layers import autocast_dtype
from blip2.train import samples
from blip2.train.average import Average
from blip2.train.flops import Peak
from blip2.train.group import Group, Step, check_alike
from blip2.train.log import Log
from blip2.train.meter import REMEDY, Meter, Report, TrainingFailed
from blip2.train.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_rate,
    sum_gradients,
    trained_parameters,
)
from blip2.train.recipes import Recipe
from blip2.train.shard import any_shares, first_bad
from blip2.train.state import load_state, save_state
from blip2.train.trackers import Trackers

MOST_BAD_STEPS = 10


class TrainingStopped(Blip2Error):
    """The training was stopped by a signal; the message says how to resume."""


@dataclass(frozen=True)
class Task:
    """Everything that the loop needs from a stage. Batches are made in another thread."""

    model: nn.Module
    learning: nn.Module
    """The part in training mode (dropout); everything else stays in evaluation mode."""
    make_batch: Callable[[int, range], Any]
    """Makes the batch of a step, for these rows of the global batch."""
    backward: Callable[[Sequence[Any], Step], dict[str, Tensor]]
    """This process's share of each loss, by name, from the parts of its share of the batch. The sum of the losses is
    minimised; this process's share of the gradient is added to ``.grad``. The sum over all processes is that of the
    global batch."""
    evaluate: Callable[[], dict[str, float]] | None = None
    num_cut: Callable[[], int] = int
    """Number of texts so far that were longer than the recipe allows."""
    bad_images: Callable[[], dict[str, str]] = dict
    """Images that could not be read so far: path to error message."""
    num_tokens: Callable[[Any], int] = lambda batch: 0
    """Number of text tokens in a part of a batch, without padding."""
    flops: Callable[[Any], float] = lambda batch: 0.0
    """Operations of a part of a batch, forward and backward, see `train.flops`."""
    sample: Callable[[], Sequence[Any]] | None = None
    """Generates texts for held-out rows, see `train.samples`."""
    rate_shares: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate, by parameter name."""
    open_features: Callable[[], None] = lambda: None
    """Called before the first batch: all processes together compute the features to keep on the disk, if any."""


def train(
    task: Task,
    recipe: Recipe,
    *,
    report: Report,
    autocast: Callable[[], AbstractContextManager],
    group: Group | None = None,
) -> None:
    """Train to the recipe's last step, resuming from the state in its folder.

    Every process of the group does the same steps with the same weights; only the first writes and reports. Raises
    `TrainingStopped` after SIGINT or SIGTERM; `TrainingFailed` if the loss is NaN or infinite ten steps in a row or in
    all steps, if it diverges, or if a trained weight is NaN or infinite; and whatever a step raises. The last good
    state is saved first.
    """
    group = group or Group()
    folder, optim = recipe.out / "training", recipe.optim
    parameters = trained_parameters(task.model)
    optimizer = build_optimizer(parameters, optim, task.rate_shares)
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device)
    average = Average(parameters, optim.ema)
    notes: dict[str, float] = {}
    first = load_state(folder, parameters, optimizer, recipe, group, average=average.weights, notes=notes)
    check_alike(group, first, parameters)
    if first > optim.steps:
        raise RecipeError(
            f"optim.steps is {optim.steps}, but {folder} has already done {first} steps; raise it, or name another "
            "folder as 'out'"
        )
    trackers, log_path = None, None
    if group.is_first:
        track, log_path = recipe.track, recipe.out / "log.jsonl"
        trackers = Trackers(track.to, recipe.out, track.project, first, lambda text: meter.say("train", done, text))
    log = Log(log_path, first, trackers)
    with autocast():
        peak = Peak(device, group.size, autocast_dtype(device) or torch.float32)
    meter = Meter(report, log, recipe, first, notes, peak if group.is_first else None)
    bad_steps, done, saved, num_bad = 0, first, first, 0.0
    is_whole = True
    has_shares = any_shares(parameters.values())
    parts = group.parts(optim.batch_size, optim.accumulate)

    def write() -> None:
        nonlocal saved
        with meter.paused():
            if group.is_first or has_shares:
                save_state(
                    folder, parameters, optimizer, recipe, step=done, average=average.weights, notes=meter.notes,
                    is_writer=group.is_first,
                )  # fmt: skip
        saved = done
        meter.say("checkpoint", done, f"saved the state after step {done}")

    def save() -> None:
        with group.together():
            write()

    def evaluate() -> None:
        if task.evaluate is not None and (done % recipe.evaluate_every == 0 or done == optim.steps):
            task.learning.eval()
            with meter.paused(), torch.no_grad(), autocast(), average.in_place():
                meter.scores(done, task.evaluate())

    def sample() -> None:
        if task.sample is None or not recipe.sample_every or (done % recipe.sample_every and done != optim.steps):
            return
        if group.is_first or recipe.shard:  # with sharded weights every process has to take part
            task.learning.eval()
            try:
                with meter.paused(), torch.no_grad(), autocast(), average.in_place():
                    found = task.sample()
                    if group.is_first:
                        samples.write(recipe.out, done, found)
            except (Blip2Error, OSError) as error:
                meter.say("train", done, f"no samples after step {done}: {error}")

    def check() -> None:
        if first_bad(parameters, group) is not None:
            raise TrainingFailed(f"after step {done} {_cause(task.model, parameters, group)}; {_state(folder, saved)}")

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
                done_here = [sum(map(count, batch)) for count in (task.flops, task.num_tokens)]
                counts = [torch.tensor(float(n)) for n in (*done_here, len(task.bad_images()), task.num_cut())]
                sums = torch.stack([*(share.float() for share in shares.values()), *(n.to(device) for n in counts)])
                sum_gradients(group, parameters, sums)
                losses = dict(zip(shares, sums, strict=False))
                is_good, norm = math.isfinite(sums[: len(losses)].sum().item()), 0.0
                if is_good:
                    norm = clip_gradients(group, parameters, optim.clip).item()
                    is_good = math.isfinite(norm)
                is_whole = False
                if is_good:
                    optimizer.step()
                    average.add(step)
                done, is_whole = step + 1, True
                optimizer.zero_grad(set_to_none=True)
                bad_steps = 0 if is_good else bad_steps + 1
                if not is_good:
                    meter.say("train", done, f"skipped step {done}: its loss or gradient is NaN or infinite")
                is_last = done == optim.steps
                if bad_steps == MOST_BAD_STEPS or (is_last and bad_steps == done):
                    reason = _cause(task.model, parameters, group)
                    if done - bad_steps > saved and first_bad(parameters, group) is None:
                        done, last = done - bad_steps, done  # no weight has changed since
                        write()
                        done = last
                    raise TrainingFailed(
                        f"the loss or its gradient was NaN or infinite in {bad_steps} steps in a row, the last is step "
                        f"{done}: {reason}; {_state(folder, saved)}"
                    )
                if sums[-2].item() != num_bad:
                    num_bad = sums[-2].item()
                    for found in group.objects(task.bad_images()):
                        meter.bad_images(done, found)
                work = {"flops": sums[-4].item(), "tokens": sums[-3].item(), "gradient_norm": norm if is_good else 0.0}
                meter.add(done, losses if is_good else {}, rate, int(sums[-1]), work)
                if done % recipe.checkpoint_every == 0 or done % recipe.evaluate_every == 0 or is_last:
                    check()
                evaluate()
                sample()
                is_stopped = group.is_any(stop.is_set())
                if is_stopped:
                    check()
                if done % recipe.checkpoint_every == 0 or is_last or is_stopped:
                    save()
                if is_stopped and not is_last:
                    raise TrainingStopped(
                        f"stopped after step {done} of {optim.steps}; the state is in {folder}: start the same recipe "
                        "again to resume"
                    )
        except TrainingFailed:  # has saved its state already
            raise
        except BaseException:
            is_to_save = group.is_first and is_whole and done > saved and not has_shares
            if is_to_save and first_not_finite(parameters) is None:
                with suppress(Exception):  # report the first error, not this one
                    write()
            raise
    average.exchange()  # the average is what is exported
    task.model.eval()


def _cause(model: nn.Module, parameters: dict[str, nn.Parameter], group: Group) -> str:
    """The most likely cause of values that are NaN or infinite, and what to do."""
    if (name := first_bad(parameters, group)) is not None:
        return f"the trained weight {name} is NaN or infinite; {REMEDY}"
    if (name := first_bad(dict(model.named_parameters()), group)) is not None:
        return f"the frozen weight {name} is NaN or infinite; start from another model"
    return f"no weight is NaN or infinite, so numbers overflow; {REMEDY}, or set precision to fp32"


def _state(folder: Path, step: int) -> str:
    return f"the state after step {step} is in {folder}" if step else "no state was saved"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal ends the process as usual."""
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
    """The autocast context, and the dtype of frozen parts. Trained parts are always stored in fp32.

    "auto" is bf16 where the hardware supports it. On a CPU the frozen parts stay in fp32: they run once for the
    features, and models that a CPU can train are small.
    """
    if precision == "fp32" or (precision == "auto" and not _has_bf16(device)):
        return nullcontext, torch.float32
    frozen_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return lambda: torch.autocast(device.type, torch.bfloat16), frozen_dtype


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
