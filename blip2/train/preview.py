"""What a training would do, without doing it: the trained parts, the memory, and the texts of the first batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from blip2.api import find_device
from blip2.checkpoint.load import empty_model
from blip2.checkpoint.quantize import quantization
from blip2.config import MatcherConfig
from blip2.data import Row
from blip2.data.joined import Joined
from blip2.placement import plan
from blip2.quantized import QuantizedLinear
from blip2.train import lora
from blip2.train.check import Materials, gather
from blip2.train.loop import autocast_for
from blip2.train.prepare import row_chance
from blip2.train.reading import order_of
from blip2.train.recipes import Recipe, load_recipe
from blip2.train.seeing import unfreeze
from blip2.train.sheets import sheet

BYTES_LEARNING = 4 + 4 + 8
"""Bytes for each trained number: itself, its gradient and its two moments, all in fp32."""
WORDS = {"vision": "image encoder", "qformer": "Q-Former, projections and heads", "language": "language model",
         "lora": "adapters"}  # fmt: skip


@dataclass(frozen=True)
class BatchText:
    """One text of the first batch: the prompt that is ``read``, and the target to be ``written``; stage 1 has no
    prompt."""

    row: Row
    kind: str
    read: str
    written: str


@dataclass(frozen=True)
class Preview:
    recipe: Recipe
    materials: Materials
    parts: dict[str, tuple[int, int]]
    """Number of trained and of frozen parameters of each part."""
    model_bytes: int
    """Bytes of all weights as they are stored."""
    texts: list[BatchText]

    @property
    def learning(self) -> int:
        return sum(learning for learning, _ in self.parts.values())

    def lines(self) -> Iterator[str]:
        """For people."""
        recipe, optim, rows = self.recipe, self.recipe.optim, self.materials.train_rows
        yield f"stage {recipe.stage}: {self.materials.start} to {recipe.out}"
        for part, (learning, frozen) in self.parts.items():
            yield f"{WORDS[part]}: {_count(learning)} trained, {_count(frozen)} frozen"
        yield (
            f"memory: {_size(self.model_bytes)} of weights, {_size(self.learning * BYTES_LEARNING)} more for training "
            "(fp32 weights, gradients, moments), plus activations"
        )
        images = len(rows if isinstance(rows, Joined) else {row.image for row in rows})
        yield f"rows: {len(rows):,} with {images:,} images"
        if self.materials.held_out_rows is not None and recipe.evaluation is not None:
            used = min(len(self.materials.held_out_rows), recipe.evaluation.max_rows)
            yield f"evaluation: {used:,} rows, every {recipe.evaluate_every:,} steps"
        epoch = len(rows) / optim.batch_size
        yield (
            f"steps: {optim.steps:,} of {optim.batch_size:,} images, {epoch:,.1f} an epoch, "
            f"{optim.steps / epoch:,.1f} epochs"
        )
        yield "the first batch:"
        for text in self.texts:
            yield f"  {Path(text.row.image).name}: {text.kind}: {_quoted(text)}"

    def sheet(self) -> str:
        """The preview as an HTML page, with the images of the first batch."""
        *about, _ = [line for line in self.lines() if not line.startswith("  ")]
        cards: dict[str, list[BatchText]] = {}
        for text in self.texts:
            cards.setdefault(text.row.image, []).append(text)
        title = f"The first batch of {self.recipe.out.name}"
        return sheet(title, about, [(some[0].row, _html(some)) for some in cards.values()])


def preview(path: Path, *, overrides: dict[str, Any] | None = None) -> Preview:
    """Preview a recipe. Nothing is computed or written, and only the configuration of the models is read.

    Raises RecipeError and CheckpointError for all problems that `run` would find before it reads weights.
    """
    recipe = load_recipe(Path(path), overrides)
    materials = gather(recipe, Path(path))
    base = "auto" if recipe.lora is None else recipe.lora.base
    quantize = quantization(base if base in ("int8", "int4") else None)
    model = empty_model(materials.config, quantize)
    sizes = dict.fromkeys(WORDS, 0)
    for name, module in model.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        packed = module.in_features * module.out_features if isinstance(module, QuantizedLinear) else 0
        sizes[lora.part_of(name)] += own + packed
    model.freeze_pretrained()
    unfreeze(model, recipe.vision)
    if recipe.lora is not None:
        lora.put(model, recipe.lora)
    learning = dict.fromkeys(sizes, 0)
    for name, parameter in model.named_parameters():
        learning[lora.part_of(name)] += parameter.numel() * parameter.requires_grad
    sizes["lora"] = learning["lora"]
    device = find_device(recipe.device)
    _, dtype = autocast_for(recipe.precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(base, dtype)
    found = plan(materials.config, device=str(device), dtype=dtype, quantize=quantize)
    parts = {part: (learning[part], total - learning[part]) for part, total in sizes.items() if total}
    return Preview(recipe, materials, parts, found.num_bytes(str(device)), _first_batch(materials, recipe))


def _first_batch(materials: Materials, recipe: Recipe) -> list[BatchText]:
    """Drawn as in `prepare`."""
    rows = materials.train_rows
    numbers = order_of(rows, recipe).draws(0) % len(rows)
    drawn = [rows.whole(each) if isinstance(rows, Joined) else rows[each] for each in numbers.tolist()]
    chances = [row_chance(recipe.seed, 0, place) for place in range(len(drawn))]
    if isinstance(materials.config, MatcherConfig):
        return [
            BatchText(row, "caption", "", chance.choice(row.captions))
            for row, chance in zip(drawn, chances, strict=True)
        ]
    source = materials.texts(recipe)
    decode = materials.tokenizer.decode
    return [
        BatchText(row, text.kind, decode(text.prompt_ids), decode(text.target_ids))
        for row, chance in zip(drawn, chances, strict=True)
        for text in source.draw(row, recipe.data.texts_per_image, chance)
    ]


def _html(some: list[BatchText]) -> str:
    """HTML of all texts about one image."""
    return "".join(
        f'<p><small>{text.kind}</small><br><span class="read">{escape(text.read)}</span> {escape(text.written)}</p>'
        for text in some
    )


def _quoted(text: BatchText) -> str:
    return f"“{text.written}”" if not text.read.strip() else f"“{text.read}” … “{text.written}”"


def _count(number: int) -> str:
    for size, unit in ((10**9, " billion"), (10**6, " million")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
