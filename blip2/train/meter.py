"""Progress of a training: means, rates and remaining time, reported and logged every ``log_every`` steps; detects
divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from blip2.errors import Blip2Error
from blip2.train.flops import Peak
from blip2.train.log import Log
from blip2.train.recipes import Recipe

FAR, FACTOR, MOST_FAR_REPORTS = 3.0, 2.0, 3
"""A loss has diverged if it exceeds the first report's by FAR and is FACTOR times as large, in MOST_FAR_REPORTS reports
in a row."""
REMEDY = "lower optim.peak_lr or set optim.clip, and start again with another 'out'"


class TrainingFailed(Blip2Error):
    """The loss is NaN or infinite, or has diverged."""


@dataclass(frozen=True)
class Progress:
    """The current progress. In ``phase`` "features", ``step`` of ``steps`` counts images, otherwise training steps.

    ``losses``: means since the last report; ``scores``: results of an evaluation; ``message``: text for the user.
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
    measures: dict[str, float] = field(default_factory=dict)
    """Other measurements: ``gradient_norm``, ``skipped`` (the share of skipped steps), ``tokens_per_s``,
    ``peak_memory_mb`` (of the first process) and ``mfu`` (model FLOP utilisation, the share of the devices' peak
    throughput)."""


Report = Callable[[Progress], None]
DONE = ("gradient_norm", "tokens", "flops")
"""Quantities that are summed over steps and over all processes."""


class Meter:
    """Means, rate and remaining time, reported and logged every ``log_every`` steps."""

    def __init__(
        self, report: Report, log: Log, recipe: Recipe, first: int, notes: dict[str, float], peak: Peak | None = None
    ) -> None:
        """``peak``: peak throughput of all devices; None where nothing is reported."""
        self._report, self._log, self._recipe, self._peak = report, log, recipe, peak
        self._done: dict[str, float] = dict.fromkeys(DONE, 0.0)
        self._sums: dict[str, Tensor] = {}
        self._count, self._last, self._started = 0, first, time.perf_counter()
        self._is_cut_reported = self._is_peak_reported = False
        self._bad: set[str] = set()
        self.notes = notes
        """Values that a resumed training needs: divergence is judged against the very first loss."""

    def add(
        self, done: int, losses: dict[str, Tensor], rate: float, num_cut: int, work: dict[str, float] | None = None
    ) -> None:
        """``losses``: those of a step that was not skipped; ``work``: its quantities of `DONE`, as far as known."""
        for name, number in (work or {}).items():
            self._done[name] += number
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._count += bool(losses)
        if done % self._recipe.log_every and done != self._recipe.optim.steps:
            return
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        steps, now = self._recipe.optim.steps, time.perf_counter()
        taken_s, num_steps = now - self._started, done - self._last
        steps_per_s = num_steps / taken_s
        images_per_s, left_s = steps_per_s * self._recipe.optim.batch_size, (steps - done) / steps_per_s
        values = {"learning_rate": rate, "images_per_s": round(images_per_s, 2), "cut_texts": num_cut,
                  "bad_pictures": len(self._bad)}  # fmt: skip
        measures, message = self._measures(taken_s, num_steps), ""
        if "mfu" in measures and not self._is_peak_reported:
            message, self._is_peak_reported = str(self._peak), True
        self._log.write({"step": done, **means, **values, **measures} | ({"mfu_of": message} if message else {}))
        if num_cut and not self._is_cut_reported:
            message, self._is_cut_reported = "some texts are longer than the recipe allows and are cut", True
        self._report(Progress("train", done, steps, means, {}, rate, images_per_s, left_s, message, measures))
        self._done = dict.fromkeys(DONE, 0.0)
        self._sums, self._count, self._last, self._started = {}, 0, done, time.perf_counter()
        if means:
            self._check_distance(done, sum(means.values()))

    def _measures(self, taken_s: float, num_steps: int) -> dict[str, float]:
        work = self._done
        found = {"skipped": 1 - self._count / num_steps}
        if self._count and work["gradient_norm"]:
            found["gradient_norm"] = work["gradient_norm"] / self._count
        if work["tokens"]:
            found["tokens_per_s"] = round(work["tokens"] / taken_s, 1)
        if self._peak is not None and work["flops"]:
            if math.isfinite(memory_mb := self._peak.memory_mb()):
                found["peak_memory_mb"] = round(memory_mb, 1)
            found["mfu"] = work["flops"] / taken_s / self._peak.flops
        return found

    def _check_distance(self, done: int, loss: float) -> None:
        """Raises TrainingFailed for a loss that has been far above the first one for several reports."""
        notes = self.notes
        first = notes.setdefault("first_loss", loss)
        notes["far_reports"] = notes.get("far_reports", 0) + 1 if loss > max(first + FAR, FACTOR * first) else 0
        if notes["far_reports"] >= MOST_FAR_REPORTS:
            raise TrainingFailed(
                f"the loss diverges: {first:.3g} at first, {loss:.3g} at step {done}; {REMEDY}"
            )

    def bad_images(self, done: int, found: dict[str, str]) -> None:
        """Report and log the new ones."""
        for path in found.keys() - self._bad:
            self._log.write({"step": done, "bad_picture": path, "problem": found[path]})
            self.say("train", done, f"skipped: {found[path]}")
        self._bad |= found.keys()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude time that is not spent on training."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def scores(self, done: int, found: dict[str, float]) -> None:
        self._log.write({"step": done, "evaluation": found})
        self._report(Progress("evaluation", done, self._recipe.optim.steps, scores=found))

    def say(self, phase: str, done: int, message: str) -> None:
        self._report(Progress(phase, done, self._recipe.optim.steps, message=message))
