"""From a recipe to a finished model: everything that a stage is made of, put together."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip2 import checkpoint
from blip2.data import FeatureFile, Pictures, Row, frozen_features, indices_of_step, read_rows
from blip2.data.features import fingerprint
from blip2.errors import CheckpointError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer
from blip2.train import stage1, stage2
from blip2.train.loop import Progress, Report, Task, autocast_for, train
from blip2.train.optim import trained_parameters
from blip2.train.recipes import Recipe, load_recipe
from blip2.train.state import recipe_done
from blip2.train.texts import TextSource


def run(path: Path, *, report: Report | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Carry out a recipe; returns the folder of the finished model, in the published layout.

    Started again it goes on where it stopped. ``overrides`` replaces values of the recipe ("optim.steps": 100).
    Raises `RecipeError`, `CheckpointError`, `TrainingStopped` and `TrainingFailed`, all `Blip2Error`.
    """
    recipe = load_recipe(Path(path), overrides)
    report = report or (lambda progress: None)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder = _folder(recipe.start, Path(path))
    if recipe_done(recipe.out / "training", recipe) and (recipe.out / "config.json").exists():
        report(Progress("done", recipe.optim.steps, recipe.optim.steps, message=f"{recipe.out} is finished already"))
        return recipe.out
    device = _device(recipe.device)
    model = checkpoint.load(folder, device=device)
    autocast = autocast_for(recipe.precision, device)
    tokenizer = Tokenizer.from_folder(folder)
    task = (
        _stage1(model, recipe, folder, tokenizer, report)
        if recipe.stage == 1
        else _stage2(model, recipe, folder, tokenizer, report, Path(path))
    )
    train(task, recipe, report=report, autocast=autocast)
    checkpoint.save(model, recipe.out, tokenizer=folder / "tokenizer.json")
    report(Progress("done", recipe.optim.steps, recipe.optim.steps, message=f"wrote {recipe.out}"))
    return recipe.out
