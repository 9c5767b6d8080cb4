"""How a training goes: means, rates and time left, reported and logged every so many steps; whether it goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from blip2.errors import Blip2Error
from blip2.train.log import Log
from blip2.train.recipes import Recipe

FAR, FACTOR, MOST_FAR_REPORTS = 3.0, 2.0, 3
"""A loss has run away if it is so much, and so many times, above that of the first report, so many reports in a row."""
REMEDY = "lower optim.peak_lr or set optim.clip, and begin anew with another 'out'"


class TrainingFailed(Blip2Error):
    """The loss is no number any more, or has run away."""


@dataclass(frozen=True)
class Progress:
    """What is going on. ``phase`` "features" counts pictures in ``step`` of ``steps``, the others training steps.

    ``losses`` are means since the last report, ``scores`` what an evaluation found, ``message`` is for people.
    """

    phase: str
    step: int
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    images_per_s: float = 0.0
    left_s: float = math.nan
    message: str = ""


Report = Callable[[Progress], None]


class Meter:
    """Means, rate and time left, reported and logged every so many steps."""

    def __init__(self, report: Report, log: Log, recipe: Recipe, first: int) -> None:
        self._report, self._log, self._recipe = report, log, recipe
        self._sums: dict[str, Tensor] = {}
        self._count, self._last, self._started = 0, first, time.perf_counter()
        self._is_cut_told = False
        self._bad: set[str] = set()
        self._first_loss, self._far_reports = math.inf, 0

    def add(self, done: int, losses: dict[str, Tensor], rate: float, num_cut: int) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._count += bool(losses)
        if done % self._recipe.log_every and done != self._recipe.optim.steps:
            return
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        steps, now = self._recipe.optim.steps, time.perf_counter()
        steps_per_s = (done - self._last) / (now - self._started)
        images_per_s, left_s = steps_per_s * self._recipe.optim.batch_size, (steps - done) / steps_per_s
        values = {"learning_rate": rate, "images_per_s": round(images_per_s, 2), "cut_texts": num_cut,
                  "bad_pictures": len(self._bad)}  # fmt: skip
        self._log.write({"step": done, **means, **values})
        message = ""
        if num_cut and not self._is_cut_told:
            message, self._is_cut_told = "some texts are longer than the recipe allows, and are cut", True
        self._report(Progress("train", done, steps, means, {}, rate, images_per_s, left_s, message))
        self._sums, self._count, self._last, self._started = {}, 0, done, now
        if means:
            self._check_distance(done, sum(means.values()))

    def _check_distance(self, done: int, loss: float) -> None:
        """Raises TrainingFailed for a loss that has been far above the first one for some reports."""
        first = self._first_loss = loss if self._first_loss == math.inf else self._first_loss
        self._far_reports = self._far_reports + 1 if loss > max(first + FAR, FACTOR * first) else 0
        if self._far_reports == MOST_FAR_REPORTS:
            raise TrainingFailed(
                f"the loss has run away: {first:.3g} at first, {loss:.3g} at step {done}; {REMEDY}"
            )

    def bad_pictures(self, done: int, found: dict[str, str]) -> None:
        """Tell and log those that are new."""
        for path in found.keys() - self._bad:
            self._log.write({"step": done, "bad_picture": path, "problem": found[path]})
            self.say("train", done, f"passed over: {found[path]}")
        self._bad |= found.keys()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes its time without being training."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def scores(self, done: int, found: dict[str, float]) -> None:
        self._log.write({"step": done, "evaluation": found})
        self._report(Progress("evaluation", done, self._recipe.optim.steps, scores=found))

    def say(self, phase: str, done: int, message: str) -> None:
        self._report(Progress(phase, done, self._recipe.optim.steps, message=message))
