"""From a recipe to a finished model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from blip2 import checkpoint
from blip2.api import find_device
from blip2.disk import locked
from blip2.errors import CheckpointError, OptionError, RecipeError
from blip2.model import Blip2
from blip2.train import lora
from blip2.train.check import check_weights, gather
from blip2.train.loop import Progress, Report, autocast_for, train
from blip2.train.prepare import prepare, take_qformer
from blip2.train.recipes import load_recipe
from blip2.train.state import is_finished


def run(path: Path, *, report: Report | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Carry out a recipe; returns the folder of the finished model, in the published layout.

    Started again it goes on where it stopped; finished, it goes on if ``optim.steps`` was raised, with the learning
    rate that the new number of steps gives. ``overrides`` replaces values of the recipe ("optim.steps": 100).
    Raises `RecipeError`, `CheckpointError`, `TrainingStopped` and `TrainingFailed`, all `Blip2Error`.
    """
    recipe = load_recipe(Path(path), overrides)
    report = report or (lambda progress: None)
    steps = recipe.optim.steps
    if is_finished(recipe):
        message = f"{recipe.out} is finished already; raise optim.steps to train on"
        report(Progress("done", steps, steps, message=message))
        return recipe.out
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    device = _device(recipe.device)
    autocast, frozen_dtype = autocast_for(recipe.precision, device)
    materials = gather(recipe, Path(path))
    base = "auto" if recipe.lora is None else recipe.lora.base
    frozen_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(base, frozen_dtype)
    quantize = base if base in ("int8", "int4") else None
    model = checkpoint.load(materials.start, device=device, dtype=frozen_dtype, quantize=quantize)
    if materials.qformer is not None:
        assert isinstance(model, Blip2)
        take_qformer(model, materials.qformer, dtype=frozen_dtype)
    if (damage := checkpoint.damage(model)) is not None:
        raise CheckpointError(f"{path}: start: {materials.start} has weights that are NaN or infinite: {damage}")
    check_weights(model, (recipe.start, recipe.qformer))
    with _alone(recipe.out):
        task = prepare(model, materials, recipe, report)
        train(task, recipe, report=report, autocast=autocast)
        if recipe.lora is not None:
            lora.save(model, recipe.out, recipe.lora, recipe.start)
        else:
            checkpoint.save(
                model,
                recipe.out,
                tokenizer=materials.start / "tokenizer.json",
                settings=materials.settings,
                frozen=materials.start,
            )
    number = len(task.bad_pictures())
    told = f"; pictures that cannot be read: {number:,}, passed over and named in log.jsonl" if number else ""
    report(Progress("done", steps, steps, message=f"wrote {recipe.out}{told}"))
    return recipe.out


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other run writes there. Raises RecipeError if one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / "training" / "lock"))
        except BlockingIOError:
            raise RecipeError(f"{out}: another run trains there; wait for its end, or name another as 'out'") from None
        except OSError as error:
            raise RecipeError(
                f"{out}: cannot be written ({error.strerror or error}); check your rights there, or name another as "
                "'out'"
            ) from None
        yield


def _device(name: str) -> torch.device:
    try:
        return find_device(name)
    except OptionError:
        raise RecipeError(f"device: {name!r} is none that is here; use 'auto', 'cpu' or 'cuda'") from None
