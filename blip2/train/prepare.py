"""A recipe's model and rows to a `Task`: what one step reads, what it computes, and how it is evaluated."""

from __future__ import annotations

import hashlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from blip2 import checkpoint
from blip2.checkpoint import ImageSettings
from blip2.data import BadPictures, FeatureFile, Pictures, Row, frozen_features, indices_of_step
from blip2.data.features import fingerprint
from blip2.errors import ImageError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer
from blip2.train import lora, stage1, stage2
from blip2.train.check import Materials
from blip2.train.loop import Progress, Report, Task
from blip2.train.recipes import Recipe
from blip2.train.texts import TextSource
from blip2.vision import VisionTransformer


class RowSet:
    """Rows with their pictures: as features from disk, or as pixels that the frozen encoder still has to see."""

    def __init__(
        self,
        rows: list[Row],
        files: Sequence[Path],
        vision: VisionTransformer,
        settings: ImageSettings,
        recipe: Recipe,
        report: Report,
        bad: BadPictures,
    ) -> None:
        self.rows = rows
        self.pictures = Pictures(self.rows, **asdict(settings), threads=recipe.threads)
        self._vision = vision
        self._bad = bad
        self._learns = recipe.lora is not None and "vision" in recipe.lora.parts
        self._file: FeatureFile | None = None
        if recipe.data.features is not None:
            listed = hashlib.sha256("\n".join(self.pictures.paths).encode()).hexdigest()
            name = f"{files[0].absolute().parent.name}-{files[0].stem}-{listed[:8]}"
            self._file = frozen_features(
                vision, self.pictures, recipe.data.features, name, report=_feature_report(report), on_bad=bad.note
            )

    def keep(self, count: int) -> None:
        """Only the first rows."""
        self.rows = self.rows[:count]

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Rows, and what is stored of their pictures: features ``float16[B, 1 + P, D]`` or pixels.

        They are the rows with these numbers, but one whose picture cannot be read gives its place to the next one
        whose can be. So a batch follows from the numbers and the files alone, whatever was read before.
        """
        numbers, found = numbers.copy(), self._stored(numbers)
        for place in range(len(numbers)):
            first = numbers[place]
            while isinstance(error := found[place], ImageError):
                self._bad.note(self.rows[numbers[place]].image, error)
                numbers[place] = (numbers[place] + 1) % len(self.rows)
                if numbers[place] == first:
                    raise RecipeError(f"none of the pictures of {len(self.rows):,} rows can be read, such as {error}")
                [found[place]] = self._stored(numbers[place : place + 1])
        # By numpy: under autocast torch would have all of one precision.
        return numbers, torch.from_numpy(np.stack([stored.numpy() for stored in found if isinstance(stored, Tensor)]))

    def _stored(self, numbers: np.ndarray) -> list[Tensor | ImageError]:
        pictures = self.pictures.number_of_row[numbers]
        if self._file is None:
            return self.pictures.read(pictures)
        return [
            self._problem(number) if features_PD[0, 0].isnan() else features_PD
            for number, features_PD in zip(pictures, self._file.read(pictures), strict=True)
        ]

    def _problem(self, number: int) -> ImageError:
        """What is wrong with a picture that could not be read when the features were made."""
        [found] = self.pictures.read([number])
        if isinstance(found, ImageError):
            return found
        return ImageError(f"{self.pictures.paths[number]}: can be read only now; start again to learn from it, too")

    def features(self, stored: Tensor) -> Tensor:
        """Features before the last norm ``float[B, 1 + P, D]`` of what `read` gave."""
        if stored.dim() == 3:
            return stored
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            return self._vision.features(stored)


def _feature_report(report: Report) -> Callable[[int, int], None]:
    started, first = time.perf_counter(), -1

    def tell(done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        rate = (done - first) / max(time.perf_counter() - started, 1e-9)
        left_s = (total - done) / rate if rate else float("nan")
        report(Progress("features", done, total, images_per_s=rate, left_s=left_s))

    return tell


def prepare(model: Blip2 | Blip2Matcher, materials: Materials, recipe: Recipe, report: Report) -> Task:
    """Everything ready for the loop. ``model`` came from ``materials.start``."""
    model.freeze_pretrained()
    learning = model.qformer if recipe.lora is None else lora.put(model, recipe.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps vanish in half precision
    tokenizer = materials.tokenizer

    bad = BadPictures(recipe.data.on_bad_picture)

    def row_set(rows: list[Row], files: Sequence[Path]) -> RowSet:
        return RowSet(rows, files, model.vision, materials.settings, recipe, report, bad)

    train_set = row_set(materials.train_rows, recipe.data.rows)
    held_out = None
    if recipe.evaluation is not None:
        held_out = row_set(materials.held_out_rows or [], recipe.evaluation.rows)
        held_out.keep(recipe.evaluation.max_rows)
    if isinstance(model, Blip2Matcher):
        task = _Stage1(model, tokenizer, recipe).task(train_set, held_out)
    else:
        task = _Stage2(model, tokenizer, recipe).task(train_set, held_out)
    return replace(task, learning=learning, bad_pictures=lambda: dict(bad.found))


T = TypeVar("T", bound=tuple)


def to_device(batch: T, device: torch.device) -> T:
    """A named tuple of tensors (and other things, and named tuples) with its tensors moved."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return to_device(value, device) if isinstance(value, tuple) and hasattr(value, "_fields") else value

    return type(batch)(*(move(value) for value in batch))


def _batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Held-out rows in order, whole batches only, because in-batch scores depend on the size; at least one."""
    size = min(batch_size, num_rows)
    for start in range(0, num_rows - size + 1, size):
        yield np.arange(start, start + size)


class Stage1Batch(NamedTuple):
    """``stored`` as `RowSet.read` gives it; texts as ``[CLS] ... [SEP]``; rows of one picture share its number."""

    stored: Tensor
    text_BT: Tensor
    text_mask_BT: Tensor
    picture_B: Tensor


class _Stage1:
    def __init__(self, model: Blip2Matcher, tokenizer: Tokenizer, recipe: Recipe) -> None:
        most = min(recipe.data.max_text_tokens, model.config.qformer.max_position_embeddings)
        self.model, self.recipe = model, recipe
        self.pad = tokenizer.token_id("[PAD]")
        self.num_cut = 0

        @lru_cache(maxsize=2**20)
        def encode(text: str) -> list[int]:
            self.num_cut += len(tokenizer.encode(text)) + 2 > most
            return tokenizer.known(tokenizer.matching_ids(text, most, truncate=True), model.config.qformer)

        self.encode = encode

    def task(self, train_set: RowSet, held_out: RowSet | None) -> Task:
        recipe, optim = self.recipe, self.recipe.optim

        def make_batch(step: int) -> Stage1Batch:
            numbers = indices_of_step(step, num_rows=len(train_set.rows), batch_size=optim.batch_size, seed=recipe.seed)
            return self.batch(train_set, numbers, _chance(recipe.seed, step))

        def losses(batch: Stage1Batch, generator: torch.Generator) -> dict[str, Tensor]:
            found = self.losses(train_set, batch, generator)
            return {"itc": found.itc, "itm": found.itm, "lm": found.lm}

        evaluate = None if held_out is None else lambda: self.evaluate(held_out)
        return Task(self.model, self.model.qformer, make_batch, losses, evaluate, lambda: self.num_cut)

    def batch(self, row_set: RowSet, numbers: np.ndarray, chance: random.Random) -> Stage1Batch:
        numbers, stored = row_set.read(numbers)
        texts = [self.encode(chance.choice(row_set.rows[number].captions)) for number in numbers]
        text_BT = np.full((len(texts), max(map(len, texts))), self.pad)
        mask_BT = np.zeros(text_BT.shape, dtype=bool)
        for row, text in enumerate(texts):
            text_BT[row, : len(text)] = text
            mask_BT[row, : len(text)] = True
        picture_B = torch.from_numpy(row_set.pictures.number_of_row[numbers])
        return Stage1Batch(stored, torch.from_numpy(text_BT), torch.from_numpy(mask_BT), picture_B)

    def losses(self, row_set: RowSet, batch: Stage1Batch, generator: torch.Generator | None) -> stage1.Stage1Losses:
        batch = to_device(batch, self.model.qformer.query_tokens.device)
        return stage1.losses(
            self.model,
            row_set.features(batch.stored),
            batch.text_BT,
            batch.text_mask_BT,
            picture_B=batch.picture_B,
            generator=generator,
            label_smoothing=self.recipe.optim.label_smoothing,
        )

    def evaluate(self, held_out: RowSet) -> dict[str, float]:
        """Means over the batches: the losses, and how well pairs are told apart within a batch."""
        chance = random.Random(0)
        generator = torch.Generator(self.model.qformer.query_tokens.device).manual_seed(0)
        sums: dict[str, list[float]] = defaultdict(list)
        for numbers in _batches(len(held_out.rows), self.recipe.optim.batch_size):
            found = self.losses(held_out, self.batch(held_out, numbers, chance), generator)
            scores = {"itc": found.itc.item(), "itm": found.itm.item(), "lm": found.lm.item()}
            for name, value in (scores | stage1.scores(found)).items():
                sums[name].append(value)
        return {name: float(np.mean(values)) for name, values in sums.items()}


class Stage2Batch(NamedTuple):
    """``stored`` as `RowSet.read` gives it; ``kinds`` names the kind of each text."""

    stored: Tensor
    texts: stage2.PackedTexts | stage2.SplitTexts
    kinds: list[str]


class _Stage2:
    def __init__(self, model: Blip2, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.source = TextSource(tokenizer, model.config.language, recipe.data)

    def task(self, train_set: RowSet, held_out: RowSet | None) -> Task:
        recipe, optim = self.recipe, self.recipe.optim

        def make_batch(step: int) -> Stage2Batch:
            numbers = indices_of_step(step, num_rows=len(train_set.rows), batch_size=optim.batch_size, seed=recipe.seed)
            return self.batch(train_set, numbers, _chance(recipe.seed, step))

        def losses(batch: Stage2Batch, _: torch.Generator) -> dict[str, Tensor]:
            return {"lm": self.losses(train_set, batch).lm}

        evaluate = None if held_out is None else lambda: self.evaluate(held_out)
        return Task(self.model, self.model.qformer, make_batch, losses, evaluate, lambda: self.source.num_cut)

    def batch(self, row_set: RowSet, numbers: np.ndarray, chance: random.Random) -> Stage2Batch:
        numbers, stored = row_set.read(numbers)
        count = self.recipe.data.texts_per_image
        drawn = [self.source.draw(row_set.rows[number], count, chance) for number in numbers]
        kinds = [text.kind for texts in drawn for text in texts]
        return Stage2Batch(stored, stage2.collate(drawn, self.model.config.language), kinds)

    def losses(self, row_set: RowSet, batch: Stage2Batch) -> stage2.Stage2Losses:
        batch = to_device(batch, self.model.qformer.query_tokens.device)
        return stage2.losses(self.model, row_set.features(batch.stored), batch.texts)

    def evaluate(self, held_out: RowSet) -> dict[str, float]:
        """The loss, and the share of texts of each kind that greedy decoding would give to the letter."""
        chance = random.Random(0)
        loss, tokens = 0.0, 0
        right: dict[str, list[bool]] = defaultdict(list)
        for numbers in _batches(len(held_out.rows), self.recipe.optim.batch_size):
            batch = self.batch(held_out, numbers, chance)
            found = self.losses(held_out, batch)
            loss += found.lm.item() * len(found.is_right_N)
            tokens += len(found.is_right_N)
            wrong_M = torch.zeros(len(batch.kinds), dtype=torch.long)
            wrong_M.index_add_(0, batch.texts.targets.text_N, (~found.is_right_N).long().cpu())
            for kind, wrong in zip(batch.kinds, wrong_M.tolist(), strict=True):
                right[kind].append(wrong == 0)
        return {"lm": loss / tokens} | {kind: float(np.mean(values)) for kind, values in sorted(right.items())}


def take_qformer(model: Blip2, folder: Path, *, dtype: torch.dtype) -> None:
    """Put the Q-Former of a stage-1 model, without its text branch, and its norm on the patches into ``model``.

    Raises RecipeError if the two were not made for each other.
    """
    source = checkpoint.load(folder, dtype=dtype)
    assert isinstance(source, Blip2Matcher)
    if fingerprint(source.vision) != fingerprint(model.vision):
        raise RecipeError(f"qformer: {folder} was trained on another image encoder than the one of 'start'")
    _copy(source.qformer, model.qformer, folder)
    _copy(source.vision.post_norm, model.vision.post_norm, folder)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, folder: Path) -> None:
    found = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            have = list(found[name].shape) if name in found else "absent"
            raise RecipeError(f"qformer: {name} is {have} in {folder}, {list(parameter.shape)} in the model of 'start'")
        parameter.copy_(found[name])


def _chance(seed: int, step: int) -> random.Random:
    return random.Random(f"{seed} {step}")
