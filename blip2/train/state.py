"""The state of a training, in one safetensors file: trained weights, moments, and the step that was done.

For each parameter: ``model.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and ``updates.<name>`` (how many).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.errors import RecipeError
from blip2.train.recipes import Recipe

STATE = "state.safetensors"
MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "updates": "step"}
FREE = {"out", "evaluation", "threads", "log_every", "evaluate_every", "checkpoint_every", "features"}
"""What of a recipe may change between stopping and going on; all else would make it another training."""


def save_state(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, recipe: Recipe, *, step: int
) -> None:
    """Written under another name first: there is always one whole state."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach().contiguous()
        for ours, theirs in MOMENTS.items():
            if theirs in optimizer.state[parameter]:
                tensors[f"{ours}.{name}"] = optimizer.state[parameter][theirs].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{STATE}.part"
    save_file(tensors, unfinished, metadata={"step": str(step), "recipe": json.dumps(_facts(recipe))})
    os.replace(unfinished, folder / STATE)


def load_state(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> int:
    """Put a saved state, if there is one, into weights and optimiser; returns the number of steps done.

    Raises RecipeError if it was saved by another recipe, naming the first difference.
    """
    path = folder / STATE
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{path}: is damaged ({error}); delete it to begin anew") from None
    _compare(path, json.loads(metadata["recipe"]), _facts(recipe))
    expected = {f"model.{name}" for name in parameters}
    if {name for name in tensors if name.startswith("model.")} != expected:
        raise RecipeError(f"{path}: was saved for another model; delete it to begin anew, or change 'out'")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            moments = {
                theirs: tensors[f"{ours}.{name}"].to(parameter.device)
                for ours, theirs in MOMENTS.items()
                if f"{ours}.{name}" in tensors
            }
            if moments:
                optimizer.state[parameter] = moments
    return int(metadata["step"])


def is_finished(recipe: Recipe) -> bool:
    """Whether this very recipe has been carried out to its end."""
    path = recipe.out / "training" / STATE
    if not path.exists() or not (recipe.out / "config.json").exists():
        return False
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return int(metadata["step"]) >= recipe.optim.steps and json.loads(metadata["recipe"]) == _facts(recipe)


def _facts(recipe: Recipe) -> dict[str, str]:
    """The recipe's values by dotted name, as text, without those that do not matter to what is learnt."""

    def walk(value: object, prefix: str) -> dict[str, str]:
        assert dataclasses.is_dataclass(value)
        facts: dict[str, str] = {}
        for entry in dataclasses.fields(value):
            inner = getattr(value, entry.name)
            if entry.name in FREE:
                continue
            if dataclasses.is_dataclass(inner):
                facts |= walk(inner, f"{prefix}{entry.name}.")
            else:
                facts[prefix + entry.name] = repr(inner)
        return facts

    return walk(recipe, "")


def _compare(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in wanted:
        if saved.get(name) != wanted[name]:
            raise RecipeError(
                f"{path}: was saved with {name} = {saved.get(name)}, the recipe says {wanted[name]}; change it "
                "back, or name another folder as 'out'"
            )
