"""From a recipe to a finished model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blip2 import checkpoint
from blip2.errors import CheckpointError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.train.loop import Progress, Report, autocast_for, train
from blip2.train.prepare import prepare, take_qformer
from blip2.train.recipes import load_recipe
from blip2.train.state import is_finished


def run(path: Path, *, report: Report | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Carry out a recipe; returns the folder of the finished model, in the published layout.

    Started again it goes on where it stopped. ``overrides`` replaces values of the recipe ("optim.steps": 100).
    Raises `RecipeError`, `CheckpointError`, `TrainingStopped` and `TrainingFailed`, all `Blip2Error`.
    """
    recipe = load_recipe(Path(path), overrides)
    report = report or (lambda progress: None)
    steps = recipe.optim.steps
    if is_finished(recipe):
        report(Progress("done", steps, steps, message=f"{recipe.out} is finished already"))
        return recipe.out
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    device = _device(recipe.device)
    autocast, frozen_dtype = autocast_for(recipe.precision, device)
    folder = _folder(recipe.start, Path(path))
    model = checkpoint.load(folder, device=device, dtype=frozen_dtype)
    if isinstance(model, Blip2Matcher) != (recipe.stage == 1):
        holds, needs = ("matching", "generative") if isinstance(model, Blip2Matcher) else ("generative", "matching")
        raise RecipeError(f"{path}: start: {folder} holds a {holds} model, stage {recipe.stage} needs a {needs} one")
    if recipe.qformer is not None:
        assert isinstance(model, Blip2)
        take_qformer(model, _folder(recipe.qformer, Path(path)), dtype=frozen_dtype)
    if (damage := checkpoint.damage(model)) is not None:
        raise CheckpointError(f"{path}: start: {folder} has weights that are NaN or infinite: {damage}")
    task = prepare(model, folder, recipe, report)
    train(task, recipe, report=report, autocast=autocast)
    checkpoint.save(model, recipe.out, tokenizer=folder / "tokenizer.json")
    report(Progress("done", steps, steps, message=f"wrote {recipe.out}"))
    return recipe.out


def _folder(name: str, recipe_path: Path) -> Path:
    """A folder beside the recipe, or else whatever has this name."""
    beside = recipe_path.absolute().parent / name
    return beside if beside.is_dir() else checkpoint.resolve(name)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: {name!r} is none; use 'auto', 'cpu' or 'cuda'") from None
