"""Texts that the model generates for held-out rows during training: HTML pages in ``samples`` of the run's folder.

Q query tokens, T text tokens, D width, B rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip2.data import Row
from blip2.disk import write_text
from blip2.generation.engine import Engine
from blip2.generation.options import GenerateOptions
from blip2.layers import without_autocast
from blip2.model import Blip2, Blip2Matcher
from blip2.tasks.write import QFormerWriter
from blip2.text import Tokenizer
from blip2.train.reading import RowSet
from blip2.train.sheets import sheet
from blip2.train.texts import TextSource

COUNT = 8
"""Number of samples: the first held-out rows."""


class Sample(NamedTuple):
    """``read``: the prompt; ``wanted``: the text of the row; ``written``: the text that the model generates by greedy
    decoding."""

    row: Row
    kind: str
    read: str
    wanted: str
    written: str


def of_stage1(model: Blip2Matcher, tokenizer: Tokenizer, held_out: RowSet, max_tokens: int) -> list[Sample]:
    """Captions from the Q-Former alone."""
    numbers, patches_BPD = _patches(model, held_out)
    suppressed = [tokenizer.token_id(name) for name in ("[PAD]", "[CLS]", "[DEC]")]
    engine = Engine(
        QFormerWriter(model), eos_token_ids=[tokenizer.token_id("[SEP]")], suppress_token_ids=suppressed
    )
    rows = [held_out.rows[number] for number in numbers]
    written = _written(engine, list(patches_BPD), tokenizer, max_tokens)
    return [Sample(row, "caption", "", row.captions[0], output) for row, output in zip(rows, written, strict=True)]


def of_stage2(
    model: Blip2, tokenizer: Tokenizer, source: TextSource, held_out: RowSet, max_tokens: int
) -> list[Sample]:
    """One text of each row, drawn by `TextSource`: the same ones each time."""
    numbers, patches_BPD = _patches(model, held_out)
    rows = [held_out.rows[number] for number in numbers]
    texts = [source.draw(row, 1, random.Random(place))[0] for place, row in enumerate(rows)]
    prompts = []
    for patches_PD, text in zip(patches_BPD, texts, strict=True):
        ids_1T = torch.tensor([text.prompt_ids], device=patches_PD.device)
        prompt_1QD = model.prompt(model.look(patches_PD[None], instruction=text.read_ids or None))
        prompts.append(torch.cat([prompt_1QD[0], model.language.embed(ids_1T)[0]]))
    engine = Engine(model.language, eos_token_ids=model.config.language.end_token_ids)
    written = _written(engine, prompts, tokenizer, max_tokens)
    return [
        Sample(row, text.kind, tokenizer.decode(text.prompt_ids), tokenizer.decode(text.target_ids), output)
        for row, text, output in zip(rows, texts, written, strict=True)
    ]


def write(folder: Path, step: int, samples: Sequence[Sample]) -> Path:
    """Write a page of samples. Raises OSError."""
    path = folder / "samples" / f"{step:07}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = ["Above, the text of the row; below, the generated text."]
    cards = [(sample.row, _html(sample)) for sample in samples]
    write_text(path, sheet(f"Samples of {folder.name} after step {step:,}", about, cards))
    return path


def _html(sample: Sample) -> str:
    is_right = sample.wanted.strip() == sample.written.strip()
    return (
        f'<p><small>{sample.kind}</small><br><span class="read">{escape(sample.read)}</span> {escape(sample.wanted)}'
        f'</p><p{"" if is_right else " class=wrong"}>{escape(sample.written) or "(nothing)"}</p>'
    )


def _patches(model: Blip2 | Blip2Matcher, held_out: RowSet) -> tuple[np.ndarray, Tensor]:
    numbers, stored = held_out.read(np.arange(min(COUNT, len(held_out.rows))))
    features_BPD = held_out.features(stored.to(model.qformer.query_tokens.device))
    return numbers, model.vision.post_norm(features_BPD.to(model.vision.post_norm.weight.dtype))


def _written(engine: Engine, prompts: list[Tensor], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    with without_autocast(prompts[0].device):
        found = engine.generate([prompt.detach() for prompt in prompts], GenerateOptions(max_new_tokens=max_tokens))
    return [tokenizer.decode(answers[0].tokens) for answers in found]
