"""Experiment trackers: TensorBoard, trackio and Weights & Biases, each in its own module.

They are optional and need no network: TensorBoard and trackio write files, and so does Weights & Biases unless
``WANDB_MODE=online`` is set. A tracker that fails does not end a training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from blip2.errors import RecipeError
from blip2.installed import install_line

NAMES = ("tensorboard", "trackio", "wandb")


class Tracker(Protocol):
    """One tracker. Values have names such as "train/lm" and "evaluation/lm"."""

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a recipe. The first error of one is reported, and it is not used again."""

    def __init__(
        self, names: tuple[str, ...], folder: Path, project: str, first: int, tell: Callable[[str], None]
    ) -> None:
        """``folder``: of the training; ``first``: the step that it resumes from."""
        self._tell = tell
        self._open: dict[str, Tracker] = {}
        for name in names:
            try:
                self._open[name] = import_module(f"blip2.train.trackers.{name}").start(folder, project, first)
            except Exception as error:
                self._drop(name, error)

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of the log."""
        if values := dict(_numbers(line)):
            self._each(lambda tracker: tracker.write(values, line["step"]))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        self._tell(f"{name} failed and is no longer used ({problem}); log.jsonl has everything")


def check(names: tuple[str, ...]) -> None:
    """Raises RecipeError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(f"track.to: {name} is not installed; {install_line(name)}, or remove it")


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name == "evaluation":
            yield from ((f"evaluation/{score}", float(found)) for score, found in value.items())
        elif name != "step" and isinstance(value, int | float):
            yield f"train/{name}", float(value)
