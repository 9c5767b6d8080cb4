"""From a recipe to a finished model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from blip2 import checkpoint
from blip2.api import find_device
from blip2.disk import locked
from blip2.errors import OptionError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.train import lora
from blip2.train.check import gather
from blip2.train.group import Group, joined
from blip2.train.loop import TrainingStopped, autocast_for, train
from blip2.train.meter import Progress, Report, TrainingFailed
from blip2.train.prepare import prepare
from blip2.train.recipes import Recipe, load_recipe
from blip2.train.shard import gather as gather_whole
from blip2.train.shard import shard
from blip2.train.start import build
from blip2.train.state import is_finished


def run(path: Path, *, report: Report | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Execute a recipe; returns the folder of the finished model, in the published layout.

    Processes that ``torchrun`` or `blip2.train.launch` started execute it together. An interrupted training resumes
    when started again. A finished one resumes if ``optim.steps`` was raised, with the learning-rate schedule of the new
    number of steps. ``overrides`` replaces values of the recipe ("optim.steps": 100). Raises `RecipeError`,
    `CheckpointError`, `TrainingStopped` and `TrainingFailed`, all `Blip2Error`.
    """
    recipe = load_recipe(Path(path), overrides)
    device = _device(recipe.device)
    with joined(device, together=(TrainingStopped, TrainingFailed)) as group:
        return _run(Path(path), recipe, group, device, report if report and group.is_first else lambda progress: None)


def _run(path: Path, recipe: Recipe, group: Group, device: torch.device, report: Report) -> Path:
    steps = recipe.optim.steps
    if is_finished(recipe):
        message = f"{recipe.out} is already finished; raise optim.steps to continue"
        report(Progress("done", steps, steps, message=message))
        return recipe.out
    if recipe.optim.batch_size < group.size:
        raise RecipeError(
            f"optim.batch_size is {recipe.optim.batch_size}, but there are {group.size} processes and each needs a "
            "row; raise it, or start fewer processes"
        )
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    autocast, frozen_dtype = autocast_for(recipe.precision, device)
    with group.in_turn("gathered", is_one_enough=True):
        materials = gather(recipe, path, lambda text: report(Progress("rows", 0, steps, message=text)))

    def load() -> Blip2 | Blip2Matcher:
        # A sharded model may not fit on one device, so it is built on the CPU first.
        place = torch.device("cpu") if recipe.shard else device
        model = build(recipe, path, materials, device=place, dtype=frozen_dtype)
        for name, part in model.named_children():
            if name not in recipe.shard:
                part.to(device)
        return model

    model = None if recipe.shard else load()
    with _locked_folder(recipe.out) if group.is_first else nullcontext():
        with group.in_turn("prepared"):  # so that only one whole model at a time is in memory
            model = load() if model is None else model
            task = prepare(model, materials, recipe, report, group)
            if recipe.shard:
                shard(model, recipe.shard, group, device)
        task.open_features()
        train(task, recipe, report=report, autocast=autocast, group=group)
        number = len({path for found in group.objects(task.bad_images()) for path in found})
        gather_whole(model, group, needs_frozen=recipe.lora is None)
        if group.is_first and recipe.lora is not None:
            lora.save(model, recipe.out, recipe.lora, recipe.start)
        elif group.is_first:
            checkpoint.save(
                model,
                recipe.out,
                tokenizer=materials.start / "tokenizer.json",
                qformer_tokenizer=materials.qformer_tokenizer,
                settings=materials.settings,
                frozen=materials.start,
                learnt=("vision_model",) if recipe.vision is not None and recipe.vision.learns else (),
            )
    note = f"; unreadable images: {number:,}, skipped and listed in log.jsonl" if number else ""
    report(Progress("done", steps, steps, message=f"wrote {recipe.out}{note}"))
    return recipe.out


@contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Lock the output folder. Raises RecipeError if another run writes there."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / "training" / "lock"))
        except BlockingIOError:
            raise RecipeError(f"{out}: another run is training there; wait until it ends, or name another folder as "
                "'out'") from None
        except OSError as error:
            raise RecipeError(
                f"{out}: is not writable ({error.strerror or error}); check your permissions there, or name another "
                "folder as 'out'"
            ) from None
        yield


def _device(name: str) -> torch.device:
    """The named device; with several GPUs the one of this process's local rank."""
    try:
        device = find_device(name)
    except OptionError:
        raise RecipeError(f"device: {name!r} is not available; use 'auto', 'cpu' or 'cuda'") from None
    number = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or number is None:
        return device
    if device.index is not None or int(number) >= torch.cuda.device_count():
        raise RecipeError(
            f"device: {name!r}: process {number} of this machine needs a GPU of its own, but there are "
            f"{torch.cuda.device_count()}; start as many processes as GPUs, with 'auto' or 'cuda' and no number"
        )
    device = torch.device("cuda", int(number))
    torch.cuda.set_device(device)
    return device
