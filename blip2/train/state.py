"""The state of a training in one safetensors file: trained weights, moments, and the number of steps done.

For each parameter: ``model.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and ``updates.<name>`` (their number),
and ``average.<name>`` if an average is kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2 import tensorfile
from blip2.disk import Stamp, digest_of, stamp_of
from blip2.errors import RecipeError
from blip2.train.group import Group
from blip2.train.recipes import Recipe
from blip2.train.shard import fill, is_share, whole

STATE = "state.safetensors"
MOMENTS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "updates": "step"}
FREE = {
    "out", "evaluation", "steps", "threads", "log_every", "evaluate_every", "checkpoint_every", "features",
    "on_bad_picture",
    "accumulate", "shard", "checkpoint_activations", "track", "sample_every",
}  # fmt: skip
"""Keys of a recipe that may change before resuming; any other change would make it another training."""
NEW = {
    "optim.itc": repr("exact"), "lora": "None", "data.sources": "()", "data.augment": "False",
    "data.cleaning": repr("none"), "data.question_prompt": repr(""), "optim.itg": "True", "text_branch": "None",
    "optim.itm": "True", "vision": "None", "optim.ema": "0.0", "data.features_dtype": repr("fp16"),
}  # fmt: skip
"""Keys that older recipes lack, with the values that they stand for."""
ROWS = "what is in data.rows"
"""A fact that is not a key of the recipe: the content of the files."""


def save_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    step: int,
    average: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, float] | None = None,
    is_writer: bool = True,
) -> None:
    """Save the state atomically. Raises RecipeError if it cannot be written.

    ``average``: by parameter name; ``notes``: numbers that a resumed training needs. With sharded weights all processes
    have to call this; only one writes.
    """
    tensors: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        if is_share(tensor):
            tensor = whole(tensor.detach()).to("cpu") if is_writer else whole(tensor.detach())[:0]
        tensors[name] = tensor

    for name, parameter in parameters.items():
        add(f"model.{name}", parameter)
        for ours, theirs in MOMENTS.items():
            if theirs in optimizer.state[parameter]:
                add(f"{ours}.{name}", optimizer.state[parameter][theirs])
    for name, weight in (average or {}).items():
        add(f"average.{name}", weight)
    if not is_writer:
        return
    path = folder / STATE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"step": str(step), "recipe": json.dumps(_facts(recipe)), "notes": json.dumps(dict(notes or {}))}
        tensorfile.save(path, tensors, about, unfinished=path.with_name(f"{STATE}.part"))
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be written ({error}); free some space there, and start the same recipe again: it resumes "
            "from the previous state"
        ) from None


def load_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    group: Group | None = None,
    *,
    average: Mapping[str, Tensor] | None = None,
    notes: dict[str, float] | None = None,
) -> int:
    """Load a saved state, if there is one, into weights, optimiser, average and notes; returns the number of steps
    done.

    Raises RecipeError if another recipe saved it, naming the first difference, or if it is damaged.
    """
    path = folder / STATE
    if not path.exists():
        return 0
    tensors, step, facts, noted = _read(path)
    _compare(path, facts, _facts(recipe))
    expected = {f"model.{name}": parameter.shape for name, parameter in parameters.items()}
    if {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")} != expected:
        raise RecipeError(f"{path}: was saved for another model; delete it to start over, or change 'out'")
    group = group or Group()
    for name, parameter in parameters.items():
        fill(parameter, tensors[f"model.{name}"], group)
        moments = {}
        for ours, theirs in MOMENTS.items():
            if (saved := tensors.get(f"{ours}.{name}")) is not None:
                moments[theirs] = saved.to(parameter.device)
                if is_share(parameter) and saved.dim():
                    fill(new := torch.empty_like(parameter, requires_grad=False), saved, group)
                    moments[theirs] = new
        if moments:
            optimizer.state[parameter] = moments
    for name, weight in (average or {}).items():
        fill(weight, tensors[f"average.{name}"], group)
    if notes is not None:
        notes.update(noted)
    return step


def is_finished(recipe: Recipe) -> bool:
    """Whether this recipe has been executed to its end. Raises RecipeError for a damaged state."""
    path = recipe.out / "training" / STATE
    made = "config.json" if recipe.lora is None else "adapter_config.json"
    if not path.exists() or not (recipe.out / made).exists():
        return False
    with suppress(OSError, LookupError, ValueError):  # `load_state` reports the error
        if int(tensorfile.read_header(path).about["step"]) < recipe.optim.steps:
            return False  # without reading the tensors
    _, step, facts, _ = _read(path)
    return step >= recipe.optim.steps and _difference(facts, _facts(recipe)) is None


def _read(path: Path) -> tuple[dict[str, Tensor], int, dict[str, str], dict[str, float]]:
    """Tensors, steps done, the recipe's facts, and notes, which older states lack."""
    try:
        tensors, about = tensorfile.load(path)
        step, facts = int(about["step"]), dict(json.loads(about["recipe"]))
        notes = dict(json.loads(about.get("notes", "{}")))
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: is damaged ({error}); delete it to start over") from None
    return tensors, step, facts, notes


def _facts(recipe: Recipe) -> dict[str, str]:
    """The recipe's values as text, by dotted name, without those that do not affect the result."""

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

    return walk(recipe, "") | {ROWS: " ".join(_digest(path, stamp_of(path)) for path in recipe.data.rows)}


@cache
def _digest(path: Path, stamp: Stamp | None) -> str:
    return digest_of(path)


def _difference(saved: dict[str, str], wanted: dict[str, str]) -> str | None:
    """The first fact that differs. Older states lack the content of data.rows and new keys."""
    known = {ROWS: wanted[ROWS]} | NEW | saved
    return next((name for name in wanted if known.get(name) != wanted[name]), None)


def _compare(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    name = _difference(saved, wanted)
    beyond = "name another folder as 'out' (and this one as 'start', to continue from its model)"
    if name == ROWS:
        raise RecipeError(f"{path}: was saved when data.rows had other rows; restore them, or {beyond}")
    if name is not None:
        raise RecipeError(
            f"{path}: was saved with {name} = {saved.get(name)}, but the recipe has {wanted[name]}; change it back, or "
            f"{beyond}"
        )
