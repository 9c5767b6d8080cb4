"""A recipe's model and rows to a `Task`: what one step reads, what it computes, and how it is evaluated."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from blip2 import checkpoint
from blip2.data import BadPictures, Row
from blip2.data.features import fingerprint
from blip2.data.joined import Joined
from blip2.errors import RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer
from blip2.train import stage1, stage2
from blip2.train.check import Materials
from blip2.train.loop import Report, Task
from blip2.train.reading import RowSet
from blip2.train.recipes import Recipe
from blip2.train.texts import TextSource


def prepare(model: Blip2 | Blip2Matcher, materials: Materials, recipe: Recipe, report: Report) -> Task:
    """Everything ready for the loop. ``model`` came from ``materials.start``."""
    model.freeze_pretrained()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps vanish in half precision
    tokenizer = materials.tokenizer

    bad = BadPictures(recipe.data.on_bad_picture)

    def row_set(rows: list[Row] | Joined, files: Sequence[Path], augment: bool = False) -> RowSet:
        return RowSet(rows, files, model.vision, materials.settings, recipe, report, bad, augment)

    train_set = row_set(materials.train_rows, recipe.data.rows, recipe.data.augment)
    held_out = None
    if recipe.evaluation is not None:
        held_out = row_set(materials.held_out_rows or [], recipe.evaluation.rows)
        held_out.keep(recipe.evaluation.max_rows)
    if isinstance(model, Blip2Matcher):
        task = _Stage1(model, tokenizer, recipe).task(train_set, held_out)
    else:
        task = _Stage2(model, tokenizer, recipe).task(train_set, held_out)
    return replace(task, bad_pictures=lambda: dict(bad.found))


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
        recipe = self.recipe

        def make_batch(step: int) -> Stage1Batch:
            numbers = train_set.draws(step)
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
        picture_B = torch.from_numpy(row_set.pictures.of_rows(numbers))
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
        recipe = self.recipe

        def make_batch(step: int) -> Stage2Batch:
            numbers = train_set.draws(step)
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
