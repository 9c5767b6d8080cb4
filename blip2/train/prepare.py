"""From a recipe's model and rows to a `Task`: what a step reads and computes, and how the model is evaluated."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip2.data import BadImages, Row
from blip2.data.joined import Joined
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer
from blip2.train import flops, lora, samples, stage1, stage2
from blip2.train.check import Materials
from blip2.train.group import Group, Step, parts_of
from blip2.train.loop import Task
from blip2.train.meter import Report
from blip2.train.reading import RowSet
from blip2.train.recipes import Recipe
from blip2.train.recompute import recompute
from blip2.train.rules import trains_vision
from blip2.train.seeing import rate_shares, unfreeze


def prepare(
    model: Blip2 | Blip2Matcher, materials: Materials, recipe: Recipe, report: Report, group: Group | None = None
) -> Task:
    """Everything that the loop needs, except the features (`Task.open_features`). ``model`` comes from
    `start.build`."""
    group = group or Group()
    model.freeze_pretrained()
    unfreeze(model, recipe.vision)
    learning = model.qformer if recipe.lora is None else lora.put(model, recipe.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small updates vanish in half precision
    recompute(model, recipe.checkpoint_activations)

    bad = BadImages(recipe.data.on_bad_picture)

    def row_set(rows: list[Row] | Joined, files: Sequence[Path], augment: bool | str = False) -> RowSet:
        return RowSet(rows, files, model.vision, materials.settings, recipe, bad, augment)

    train_set = row_set(materials.train_rows, recipe.data.rows, recipe.data.augment)
    held_out = None
    if recipe.evaluation is not None:
        rows = materials.held_out_rows or []
        # So no features are computed for the rest of a large collection.
        rows = rows.first(recipe.evaluation.max_rows) if isinstance(rows, Joined) else rows
        held_out = row_set(rows, recipe.evaluation.rows)
    if isinstance(model, Blip2Matcher):
        task = _Stage1(model, materials.tokenizer, recipe, group).task(train_set, held_out)
    else:
        task = _Stage2(model, materials, recipe, group).task(train_set, held_out)

    def open_features() -> None:
        for each in (train_set, held_out):
            if each is not None:
                each.open_features(report, group)
        if held_out is not None and recipe.evaluation is not None:
            held_out.keep(recipe.evaluation.max_rows)

    return replace(
        task,
        learning=learning,
        open_features=open_features,
        bad_images=lambda: dict(bad.found),
        rate_shares=rate_shares(model, recipe.vision),
    )


T = TypeVar("T", bound=tuple)
Examined = TypeVar("Examined")
Chance = Callable[[int], random.Random]
"""The random generator of a row of the global batch."""


def to_device(batch: T, device: torch.device) -> T:
    """A named tuple with its tensors moved to ``device``, also those of named tuples inside it."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return to_device(value, device) if isinstance(value, tuple) and hasattr(value, "_fields") else value

    return type(batch)(*(move(value) for value in batch))


def _batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Held-out rows in order. Only whole batches, since in-batch scores depend on the batch size, but at least one."""
    size = min(batch_size, num_rows)
    for start in range(0, num_rows - size + 1, size):
        yield np.arange(start, start + size)


def _evaluated(
    look: Callable[[int, np.ndarray], Examined], held_out: RowSet, recipe: Recipe, group: Group
) -> list[Examined]:
    """The results of ``look`` for each batch of held-out rows, in order. The processes take turns.

    A process without a batch of its own repeats another's: with sharded weights all processes have to take part.
    """
    batches = list(enumerate(_batches(len(held_out.rows), recipe.optim.batch_size)))
    own = [(turn + group.rank) % len(batches) for turn in range(0, len(batches), group.size)]
    found = group.objects([(number, look(*batches[number])) for number in own])
    return [looked for _, looked in sorted(dict(pair for pairs in found for pair in pairs).items())]


class Stage1Batch(NamedTuple):
    """``stored`` comes from `RowSet.read`; texts are ``[CLS] ... [SEP]``; rows with the same image share its number.

    ``place_B``: indices of the rows in the global batch.
    """

    stored: Tensor
    text_BT: Tensor
    text_mask_BT: Tensor
    image_B: Tensor
    place_B: Tensor


class _Stage1:
    def __init__(self, model: Blip2Matcher, tokenizer: Tokenizer, recipe: Recipe, group: Group) -> None:
        most = min(recipe.data.max_text_tokens, model.config.qformer.max_position_embeddings)
        self.model, self.tokenizer, self.recipe, self.group = model, tokenizer, recipe, group
        self.pad = tokenizer.token_id("[PAD]")
        self.num_cut = 0

        @lru_cache(maxsize=2**20)
        def encode(text: str) -> list[int]:
            self.num_cut += len(tokenizer.encode(text)) + 2 > most
            return tokenizer.known(tokenizer.matching_ids(text, most, truncate=True), model.config.qformer)

        self.encode = encode

    def task(self, train_set: RowSet, held_out: RowSet | None) -> Task:
        recipe, optim = self.recipe, self.recipe.optim

        def make_batch(step: int, places: range) -> Stage1Batch:
            numbers = train_set.draws(step)
            return self.batch(train_set, numbers, places, lambda place: row_chance(recipe.seed, step, place))

        def backward(batches: Sequence[Stage1Batch], step: Step) -> dict[str, Tensor]:
            batches = [to_device(batch, self.model.qformer.query_tokens.device) for batch in batches]
            encoded = train_set.encode_parts([(batch.stored, batch.place_B) for batch in batches], step)
            parts = [stage1.Part(found, *rest) for found, (_, *rest) in zip(encoded.features, batches, strict=True)]
            shares = stage1.backward(
                self.model, parts, step, label_smoothing=optim.label_smoothing, itc=optim.itc, itm=optim.itm,
                itg=optim.itg,
            )
            encoded.backward()
            return shares

        evaluate = None if held_out is None else lambda: self.evaluate(held_out)
        return Task(
            self.model, self.model.qformer, make_batch, backward, evaluate, lambda: self.num_cut,
            num_tokens=lambda batch: int(batch.text_mask_BT.sum()),
            flops=lambda batch: flops.of_stage1(
                self.model.config, _texts(batch), vision_passes=_vision_passes(recipe, batch.stored), itm=optim.itm,
                itg=optim.itg,
            ),
            sample=None if held_out is None else lambda: samples.of_stage1(
                self.model, self.tokenizer, held_out, recipe.data.max_text_tokens
            ),
        )  # fmt: skip

    def batch(self, row_set: RowSet, numbers: np.ndarray, places: range, chance: Chance) -> Stage1Batch:
        numbers, stored = row_set.read(numbers[places])
        texts = [
            self.encode(chance(place).choice(row_set.rows[number].captions))
            for place, number in zip(places, numbers, strict=True)
        ]
        text_BT = np.full((len(texts), max(map(len, texts))), self.pad)
        mask_BT = np.zeros(text_BT.shape, dtype=bool)
        for row, text in enumerate(texts):
            text_BT[row, : len(text)] = text
            mask_BT[row, : len(text)] = True
        tensors = map(torch.from_numpy, (text_BT, mask_BT, row_set.images_of(numbers), np.array(places)))
        return Stage1Batch(stored, *tensors)

    def losses(self, row_set: RowSet, batch: Stage1Batch, generator: torch.Generator | None) -> stage1.Stage1Losses:
        batch = to_device(batch, self.model.qformer.query_tokens.device)
        return stage1.losses(
            self.model,
            row_set.features(batch.stored),
            batch.text_BT,
            batch.text_mask_BT,
            image_B=batch.image_B,
            generator=generator,
            label_smoothing=self.recipe.optim.label_smoothing,
            num_parts=self.group.size * self.recipe.optim.accumulate,  # the same part size as in training
        )

    def evaluate(self, held_out: RowSet) -> dict[str, float]:
        """Means over the batches: the losses, and the in-batch retrieval and matching accuracy."""
        generator = torch.Generator(self.model.qformer.query_tokens.device)

        def look(number: int, numbers: np.ndarray) -> dict[str, float]:
            places = range(len(numbers))
            batch = self.batch(held_out, numbers, places, lambda place: row_chance(0, number, place))
            found = self.losses(held_out, batch, generator.manual_seed(number))
            return {"itc": found.itc.item(), "itm": found.itm.item(), "lm": found.lm.item(), **stage1.scores(found)}

        looked = _evaluated(look, held_out, self.recipe, self.group)
        return {name: float(np.mean([scores[name] for scores in looked])) for name in looked[0]}


class Stage2Batch(NamedTuple):
    """``stored`` comes from `RowSet.read`; ``kinds``: the kind of each text; ``place_B`` as in stage 1."""

    stored: Tensor
    texts: stage2.PackedTexts | stage2.SplitTexts
    kinds: list[str]
    place_B: Tensor
    read: stage2.ReadTexts | None


class _Stage2:
    def __init__(self, model: Blip2, materials: Materials, recipe: Recipe, group: Group) -> None:
        self.model, self.tokenizer, self.recipe, self.group = model, materials.tokenizer, recipe, group
        self.source = materials.texts(recipe)

    def task(self, train_set: RowSet, held_out: RowSet | None) -> Task:
        recipe = self.recipe

        def make_batch(step: int, places: range) -> Stage2Batch:
            numbers = train_set.draws(step)
            return self.batch(train_set, numbers, places, lambda place: row_chance(recipe.seed, step, place))

        def backward(batches: Sequence[Stage2Batch], step: Step) -> dict[str, Tensor]:
            own = sum(len(batch.texts.targets.token_N) for batch in batches)
            count = int(step.group.sum(torch.tensor(own)))  # on the CPU, to avoid waiting for the GPU
            width = step.group.most(max(0 if each.read is None else each.read.token_MT.shape[1] for each in batches))

            def parts() -> Iterator[stage2.Part]:
                for batch in (to_device(batch, self.model.qformer.query_tokens.device) for batch in batches):
                    encoded = train_set.encode_parts([(batch.stored, batch.place_B)], step)
                    read = None if batch.read is None else batch.read.wider(width)
                    yield stage2.Part(encoded.features[0], batch.texts, batch.place_B, read)
                    encoded.backward()

            return stage2.backward(self.model, parts(), step, count)

        evaluate = None if held_out is None else lambda: self.evaluate(held_out)
        return Task(
            self.model, self.model.qformer, make_batch, backward, evaluate, lambda: self.source.num_cut,
            num_tokens=lambda batch: stage2.num_tokens(batch.texts),
            flops=lambda batch: flops.of_stage2(
                self.model.config, stage2.sizes(batch.texts), vision_passes=_vision_passes(recipe, batch.stored),
                prompts=None if batch.read is None else (len(batch.read.token_MT), batch.read.token_MT.shape[1]),
            ),
            sample=None if held_out is None else lambda: samples.of_stage2(
                self.model, self.tokenizer, self.source, held_out, recipe.data.max_text_tokens
            ),
        )  # fmt: skip

    def batch(self, row_set: RowSet, numbers: np.ndarray, places: range, chance: Chance) -> Stage2Batch:
        numbers, stored = row_set.read(numbers[places])
        count = self.recipe.data.texts_per_image
        drawn = [
            self.source.draw(row_set.rows[number], count, chance(place))
            for place, number in zip(places, numbers, strict=True)
        ]
        kinds = [text.kind for texts in drawn for text in texts]
        place_B, read = torch.from_numpy(np.array(places)), None
        if self.model.config.reads_prompt:
            read = stage2.collate_read(drawn)
            drawn = [[text] for texts in drawn for text in texts]
        return Stage2Batch(stored, stage2.collate(drawn, self.model.config.language), kinds, place_B, read)

    def losses(self, row_set: RowSet, batch: Stage2Batch) -> stage2.Stage2Losses:
        batch = to_device(batch, self.model.qformer.query_tokens.device)
        return stage2.losses(self.model, row_set.features(batch.stored), batch.texts, batch.read)

    def evaluate(self, held_out: RowSet) -> dict[str, float]:
        """The loss, and for each kind of text the share that greedy decoding would reproduce exactly."""

        def look(number: int, numbers: np.ndarray) -> tuple[float, int, list[tuple[str, bool]]]:
            loss, tokens, exact = 0.0, 0, []
            # The same part size as in training.
            for places in parts_of(range(len(numbers)), self.group.size * self.recipe.optim.accumulate):
                batch = self.batch(held_out, numbers, places, lambda place: row_chance(0, number, place))
                found = self.losses(held_out, batch)
                wrong_M = torch.zeros(len(batch.kinds), dtype=torch.long)
                wrong_M.index_add_(0, batch.texts.targets.text_N, (~found.is_right_N).long().cpu())
                exact += [(kind, wrong == 0) for kind, wrong in zip(batch.kinds, wrong_M.tolist(), strict=True)]
                tokens += len(found.is_right_N)
                loss += found.lm.item() * len(found.is_right_N)
            return loss, tokens, exact

        right: dict[str, list[bool]] = defaultdict(list)
        looked = _evaluated(look, held_out, self.recipe, self.group)
        for _, _, exact in looked:
            for kind, is_right in exact:
                right[kind].append(is_right)
        loss = sum(loss for loss, _, _ in looked) / sum(tokens for _, tokens, _ in looked)
        return {"lm": loss} | {kind: float(np.mean(values)) for kind, values in sorted(right.items())}


def _texts(batch: Stage1Batch) -> flops.Texts:
    rows, width = batch.text_BT.shape
    return flops.Texts(rows, width, int(batch.text_mask_BT[:, 1:].sum()))


def _vision_passes(recipe: Recipe, stored: Tensor) -> int:
    """How many times the cost of the image encoder's forward pass a step has."""
    if stored.dim() == 3:
        return 0
    return 3 if recipe.vision is not None and recipe.vision.learns else 2 if trains_vision(recipe) else 1


def row_chance(seed: int, step: int, place: int) -> random.Random:
    """The random generator of a row of a batch, the same in every process."""
    return random.Random(f"{seed} {step} {place}")
