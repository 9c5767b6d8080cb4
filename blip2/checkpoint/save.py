"""Save a model in the published layout; nothing is ever half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from blip2.checkpoint.load import WEIGHTS, named_tensors
from blip2.checkpoint.settings import ImageSettings, config_json, preprocessor_json
from blip2.config import Blip2Config, OPTConfig
from blip2.model import Blip2, Blip2Matcher


def save(
    model: Blip2 | Blip2Matcher,
    folder: Path,
    *,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, model.safetensors and what the processors need into ``folder``.

    ``tokenizer`` is the path or the text of a tokenizer.json. ``dtype`` casts the weights (as they are, if None).
    Each file is written under a temporary name and renamed; config.json comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in named_tensors(model)}
    unfinished = folder / f"{WEIGHTS}.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / WEIGHTS)
    if tokenizer is not None:
        text = tokenizer.read_text(encoding="utf-8") if isinstance(tokenizer, Path) else tokenizer
        _write(folder / "tokenizer.json", text)
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(folder / "preprocessor_config.json", preprocessor_json(ImageSettings(model.config.vision.image_size)))
    # safetensors writes for the owner alone; a model is as readable as the files beside it.
    shutil.copymode(folder / "preprocessor_config.json", folder / WEIGHTS)
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": model.config.qformer.num_query_tokens}
    _write_json(folder / "processor_config.json", processor)
    if isinstance(model.config, Blip2Config):
        _write_json(folder / "generation_config.json", _generation(model.config))
    _write_json(folder / "config.json", config_json(model.config))


def _generation(config: Blip2Config) -> dict[str, Any]:
    language = config.language
    start = (
        {"bos_token_id": language.bos_token_id}
        if isinstance(language, OPTConfig)
        else {"bos_token_id": language.eos_token_id, "decoder_start_token_id": language.decoder_start_token_id}
    )
    return start | {"eos_token_id": language.eos_token_id, "pad_token_id": language.pad_token_id}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
