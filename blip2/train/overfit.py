"""A check before a long training: can the model memorise a few rows? If not, the data, the recipe or the model is
wrong, and more rows will not help."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.data import Row
from blip2.data.joined import Joined
from blip2.data.sample import Turn
from blip2.errors import OptionError, option
from blip2.train.check import gather
from blip2.train.meter import Progress, Report
from blip2.train.recipes import load_recipe
from blip2.train.run import run

MOST_STEPS, WARM_UP = 200, 10
HALF, SMALL = 0.5, 0.1
"""Rows count as memorised if the sum of a stage's losses has fallen to half of its first value, or is small."""


@dataclass(frozen=True)
class Verdict:
    """``first``: loss of the first step; ``last``: loss over the same rows after ``steps`` steps, without dropout."""

    rows: int
    steps: int
    first: float
    last: float
    scores: dict[str, float]

    @property
    def is_learnt(self) -> bool:
        return self.last <= max(HALF * self.first, SMALL)

    def __str__(self) -> str:
        change = f"the loss of {self.rows} rows went from {self.first:.3g} to {self.last:.3g} in {self.steps} steps"
        if self.is_learnt:
            return f"memorised: {change}"
        return (
            f"not memorised: {change}; check the texts (--dry-run), raise optim.peak_lr, or train more parts of the "
            "model, before you train on more rows"
        )


def overfit(path: Path, number: int, *, report: Report, overrides: dict[str, Any] | None = None) -> Verdict:
    """Memorise the first ``number`` rows, each with one text of each kind, in a temporary folder.

    Follows the recipe, but with at most 200 steps, a constant learning rate, whole images and no label smoothing.
    Raises as `run` does.
    """
    if number < 1:
        raise OptionError(f"{option('overfit')} is {number}; give a number of rows, such as 8")
    recipe = load_recipe(Path(path), overrides)
    found = gather(recipe, Path(path)).train_rows
    number = min(number, len(found))
    rows = [found.whole(each) for each in range(number)] if isinstance(found, Joined) else found[:number]
    steps = min(recipe.optim.steps, MOST_STEPS)
    losses: list[dict[str, float]] = []
    scores: dict[str, float] = {}

    def listen(progress: Progress) -> None:
        if progress.losses:
            losses.append(progress.losses)
        scores.update(progress.scores)
        if progress.phase in ("features", "train"):
            report(progress)

    with tempfile.TemporaryDirectory(prefix="blip2-overfit-") as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        records = [_record(row, folder / f"picture-{each}") for each, row in enumerate(rows)]
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        changes: dict[str, Any] = {
            "data.sources": [], "evaluation.sources": [], "data.augment": False,
            "out": folder / "out", "data.rows": file, "evaluation.rows": file, "evaluate_every": steps,
            "checkpoint_every": steps, "log_every": 1, "optim.steps": steps, "optim.label_smoothing": 0.0,
            "optim.batch_size": min(recipe.optim.batch_size, len(rows)), "optim.min_lr": recipe.optim.peak_lr,
            "optim.warmup_steps": min(recipe.optim.warmup_steps, WARM_UP),
        }  # fmt: skip
        if recipe.data.features is not None:
            changes["data.features"] = folder / "features"
        run(path, report=listen, overrides=(overrides or {}) | changes)
    last = sum(scores[name] for name in losses[0])
    return Verdict(len(rows), steps, sum(losses[0].values()), last, scores)


def _record(row: Row, place: Path) -> dict[str, Any]:
    """A row as a line of JSON, with only the first text of each kind, since several texts of one image cannot all be
    predicted. An image inside another file is written to ``place``."""
    if row.content is not None:
        place.write_bytes(row.content)
    return {
        "image": str(Path(row.image).absolute() if row.content is None else place),
        "captions": row.captions[:1],
        "questions": [_turn(turn) for turn in row.questions[:1]],
        "dialogues": [[_turn(dialogue[0])] for dialogue in row.dialogues[:1]],
    }


def _turn(turn: Turn) -> dict[str, str]:
    return {"question": turn.question, "answer": turn.answer}
