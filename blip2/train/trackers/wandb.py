"""Weights & Biases: written to ``OUT/wandb`` and uploaded later by ``wandb sync``, or at once with
``WANDB_MODE=online``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class _Tracker:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "trainer/step": step})  # its own step count cannot go back when a training resumes

    def close(self) -> None:
        self._run.finish()


def start(folder: Path, project: str, first: int) -> _Tracker:
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project=project, name=folder.name, dir=str(folder), mode=mode, resume="allow", id=folder.name)
    run.define_metric("*", step_metric="trainer/step")
    return _Tracker(run)
