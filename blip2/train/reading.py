"""The rows of a step and their images, as features from disk or as pixels."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2.checkpoint import ImageSettings
from blip2.data import BadImages, FeatureFile, Order, Row, RowImages, frozen_features
from blip2.data.joined import Joined
from blip2.errors import ImageError, RecipeError
from blip2.model import Vision
from blip2.train.group import Group, Step
from blip2.train.meter import Progress, Report
from blip2.train.recipes import Recipe
from blip2.train.rules import trains_vision
from blip2.train.seeing import EncodedParts


def order_of(rows: list[Row] | Joined, recipe: Recipe) -> Order:
    sizes, weights = (rows.sizes, rows.weights) if isinstance(rows, Joined) else ((len(rows),), ())
    return Order(sizes, recipe.seed, recipe.optim.batch_size, weights)


class RowSet:
    """Rows with their images: as features from disk, or as pixels for the image encoder."""

    def __init__(
        self,
        rows: list[Row] | Joined,
        files: Sequence[Path],
        vision: Vision,
        settings: ImageSettings,
        recipe: Recipe,
        bad: BadImages,
        augment: bool | str = False,
    ) -> None:
        self.rows = rows
        self._order = order_of(rows, recipe)
        self._recipe = recipe
        self._files = files
        self.images = RowImages(
            self.rows, **asdict(settings), threads=recipe.threads, is_distinct=recipe.data.features is not None,
            is_randaugmented=augment == "randaugment",
        )  # fmt: skip
        self._vision = vision
        self._bad = bad
        self._seed = recipe.seed if augment else None
        self._learns = trains_vision(recipe)
        self._file: FeatureFile | None = None

    def open_features(self, report: Report, group: Group) -> None:
        """If the recipe keeps features: compute or open them, by all processes together, before `read`."""
        if (folder := self._recipe.data.features) is None:
            return
        files, paths = self._files, "\n".join(self.images.paths)
        stem = f"{files[0].absolute().parent.name}-{files[0].stem}" if files else "sources"
        name = f"{stem}-{hashlib.sha256(paths.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
        self._file = frozen_features(
            self._vision, self.images, folder, name, dtype=self._recipe.data.features_dtype, workers=group,
            report=_feature_report(report), on_bad=self._bad.note,
        )  # fmt: skip

    def keep(self, count: int) -> None:
        """Keep only the first ``count`` rows."""
        self.rows = self.rows.first(count) if isinstance(self.rows, Joined) else self.rows[:count]

    def draws(self, step: int) -> np.ndarray:
        """The draws of a step, int64[B] for the global batch, see `Order`."""
        return self._order.draws(step)

    def read(self, draws: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Row numbers and the stored form of their images: features ``float16[B, 1 + P, D]`` or pixels.

        These are the rows of the draws, but a row whose image cannot be read is replaced by the next readable row. So a
        batch depends only on the draws and the files, not on what was read before.
        """
        numbers = draws % len(self.rows)
        found = self._stored(numbers, draws)
        for place in range(len(numbers)):
            first = numbers[place]
            while isinstance(error := found[place], ImageError):
                self._bad.note(self.rows[numbers[place]].image, error)
                numbers[place] = (numbers[place] + 1) % len(self.rows)
                if numbers[place] == first:
                    raise RecipeError(f"none of the images of {len(self.rows):,} rows can be read; one error: {error}")
                [found[place]] = self._stored(numbers[place : place + 1], draws[place : place + 1])
        # With numpy, since under autocast torch would convert all to one dtype.
        return numbers, torch.from_numpy(np.stack([stored.numpy() for stored in found if isinstance(stored, Tensor)]))

    def _stored(self, numbers: np.ndarray, draws: np.ndarray) -> list[Tensor | ImageError]:
        images = self.images.of_rows(numbers)
        if self._file is None:
            if self._seed is None:
                return self.images.read(images)
            # A draw is one row in one epoch: a different augmentation each time, the same one in every process.
            return self.images.read(images, [random.Random(f"{self._seed} {draw}") for draw in draws.tolist()])
        return [
            self._problem(row, number, features_PD) or features_PD
            for row, number, features_PD in zip(numbers, images, self._file.read(images), strict=True)
        ]

    def _problem(self, row: int, number: int, features_PD: Tensor) -> ImageError | None:
        """The error of an image that was unreadable when the features were made, or of a row that is unreadable now."""
        if isinstance(self.rows, Joined):
            try:
                self.rows.shown(row)
            except ImageError as error:
                return error
        if not features_PD[0, 0].isnan():
            return None
        [found] = self.images.read([number])
        if isinstance(found, ImageError):
            return found
        return ImageError(f"{self.images.name(number)}: could not be read before, but can be now; start again to "
            "train on it, too")

    def images_of(self, numbers: np.ndarray) -> np.ndarray:
        """int64[B]: numbers of the images of rows that have been read; equal for rows with the same image."""
        if isinstance(self.rows, Joined):
            return np.array([self.rows.shown(number) for number in numbers.tolist()])
        return self.images.of_rows(numbers)

    def features(self, stored: Tensor) -> Tensor:
        """Features before the last norm ``float[B, 1 + P, D]`` from what `read` returned."""
        if stored.dim() == 3:
            return stored
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            return self._vision.features(stored)

    def encode_parts(self, parts: Sequence[tuple[Tensor, Tensor]], step: Step) -> EncodedParts:
        """The encoded parts of a batch. ``parts``: what `read` returned, and the indices of the rows in the global
        batch."""
        return EncodedParts(self.features, self._learns, parts, step)


def _feature_report(report: Report) -> Callable[[int, int], None]:
    started, first = time.perf_counter(), -1

    def tell(done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        rate = (done - first) / max(time.perf_counter() - started, 1e-9)
        left_s = (total - done) / rate if rate else float("nan")
        report(Progress("features", done, total, images_per_s=rate, left_s=left_s))

    return tell
