"""Describes a single part from its own published files: a language model, an image encoder, a BERT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from blip2.checkpoint.bert import bert_config
from blip2.checkpoint.describe import language_line, size_of, vision_line
from blip2.checkpoint.encoders import open_encoder
from blip2.checkpoint.families import FAMILIES
from blip2.checkpoint.load import count_parameters, empty_model
from blip2.checkpoint.quantize import quantization
from blip2.checkpoint.settings import LANGUAGES, read_json, read_language
from blip2.model import build_image_encoder
from blip2.qformer import QFormer

ENCODERS = tuple(name for name in FAMILIES if not name.endswith("_vision_model"))
STARTS = ("bert",)
"""What a Q-Former can start from, besides another BLIP-2."""


@dataclass(frozen=True)
class SinglePart:
    """``kind``: "language model", "image encoder" or "BERT". ``option``: the option of `blip2 assemble` for it.
    ``architecture``: a one-line summary. ``memory_bytes``: of its weights, by dtype."""

    kind: str
    family: str
    option: str
    architecture: str
    num_parameters: int
    memory_bytes: dict[str, int]


def describe_part(folder: Path) -> SinglePart | None:
    """None if it is not a part: a whole BLIP-2, or another kind of model. Raises CheckpointError for a part whose files
    do not match its family."""
    content = read_json(folder / "config.json")
    family = content.get("model_type")
    if "qformer_config" in content or not isinstance(family, str):
        return None
    if family in LANGUAGES:
        config = read_language(folder)
        memory = {}
        for kind in (None, "int8", "int4"):
            memory[kind or "bfloat16"] = size_of(empty_model(config, quantization(kind)))
        number = count_parameters(empty_model(config))
        return SinglePart("language model", family, "--language", language_line(config), number, memory)
    if family in FAMILIES:
        encoder = open_encoder(folder)
        with torch.device("meta"):
            vision = build_image_encoder(encoder.trained)
        token = "a class token" if encoder.config.keeps_class_token else "no class token"
        number = count_parameters(vision)
        memory = {"float32": 4 * number, "bfloat16": 2 * number}
        line = f"{vision_line(encoder.config)}, {token}"
        return SinglePart("image encoder", family, "--vision", line, number, memory)
    if family in STARTS:
        start = bert_config(folder)
        with torch.device("meta"):
            number = count_parameters(QFormer(start))
        line = f"{start.num_layers} layers of width {start.hidden_size}, {start.num_heads} heads; as a Q-Former:"
        return SinglePart("BERT", family, "--qformer", line, number, {"float32": 4 * number})
    return None
