"""Save a model in the published layout; nothing is ever half-written, and a model that was there stays until the end.

Weights are written one file at a time, of 5 GB at most as on the hub, so that the peak is the model and one file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blip2.checkpoint.files import INDEX, QFORMER_TOKENIZER, WEIGHTS
from blip2.checkpoint.preprocessor import ImageSettings, preprocessor_json
from blip2.checkpoint.quantize import CODES, SCALES, quantization_of
from blip2.checkpoint.settings import config_json
from blip2.checkpoint.tensors import named_tensors
from blip2.config import Blip2Config, T5Config
from blip2.disk import replace
from blip2.errors import CheckpointError
from blip2.model import Blip2, Blip2Matcher
from blip2.plaintext import read_text

MAX_SHARD_SIZE_BYTES = 5 * 10**9
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.part)?")


def save(
    model: Blip2 | Blip2Matcher,
    folder: Path,
    *,
    tokenizer: Path | str | None = None,
    qformer_tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size_bytes: int = MAX_SHARD_SIZE_BYTES,
    quantization: dict[str, Any] | None = None,
    settings: ImageSettings | None = None,
) -> None:
    """Write config.json, the weights and what the processors need into ``folder``.

    ``tokenizer`` is the path or the text of a tokenizer.json; so is ``qformer_tokenizer``, of an InstructBLIP, which by
    default is the one that stands beside it in a folder of its own. ``dtype`` casts the weights (as they are, if None),
    quantised ones excepted. More than ``max_shard_size_bytes`` of weights become several files with an index.
    ``quantization`` is what config.json is to say of weights that are quantised (see `read_quantization`); by default
    what the model's layers say. ``settings``: how pictures become pixels; by default as in the published models.

    Everything is written under temporary names, synced, then renamed, config.json last; then what an earlier save of
    another size left is removed. Raises `CheckpointError` if the disk is full or the folder cannot be written: nothing
    of the attempt stays, and the model that was there is as it was.
    """
    if quantization is None and (found := quantization_of(model)) is not None:
        quantization = found.as_json()
    sizes = [(name, tensor.numel() * _dtype(name, tensor, dtype).itemsize) for name, tensor in named_tensors(model)]
    tensors = ((name, tensor.to("cpu", _dtype(name, tensor, dtype))) for name, tensor in named_tensors(model))
    texts = texts_of(model, tokenizer, quantization, settings, qformer_tokenizer)
    write_model(folder, sizes, tensors, texts, max_shard_size_bytes)


def write_model(
    folder: Path,
    sizes: list[tuple[str, int]],
    tensors: Iterator[tuple[str, Tensor]],
    texts: dict[str, str],
    max_shard_size_bytes: int = MAX_SHARD_SIZE_BYTES,
) -> None:
    """Write tensors and small files, config.json the last; ``sizes`` in bytes, in their order, decide on the shards.

    A file's tensors are in memory at a time. For the rest see `save`.
    """
    files = _split(sizes, max_shard_size_bytes)
    num_bytes = 0
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, names in files.items():
            written.append(folder / f"{file}.part")
            chosen = {name: tensor.contiguous() for name, tensor in islice(tensors, len(names))}
            assert list(chosen) == names, (list(chosen), names)
            save_file(chosen, written[-1], metadata={"format": "pt"})
            num_bytes += sum(tensor.nbytes for tensor in chosen.values())
            del chosen
        if len(files) > 1:
            places = {name: file for file, names in files.items() for name in names}
            texts = {INDEX: _json({"metadata": {"total_size": num_bytes}, "weight_map": places})} | texts
        for file, text in texts.items():
            written.append(folder / f"{file}.part")
            written[-1].parent.mkdir(exist_ok=True)
            written[-1].write_text(text, encoding="utf-8")
        for part in written:
            # safetensors writes for the owner alone; a model is as readable as the files beside it.
            shutil.copymode(written[-1], part)
        replace([(part, part.with_suffix("")) for part in written])
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: the model cannot be written ({reason}); make room there, or save to another folder"
        ) from None
    finally:
        for part in written:
            part.unlink(missing_ok=True)
    for old in folder.iterdir():
        if OURS.fullmatch(old.name) and old.name not in {*files, *texts}:
            old.unlink()


def _split(sizes: list[tuple[str, int]], limit: int) -> dict[str, list[str]]:
    """Tensors to files in order, each file as full as the limit allows; a tensor above it has a file of its own."""
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes:
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What it is written as: a quantised weight, in its two tensors, is as it is."""
    is_quantized = name.endswith((f".{CODES}", f".{SCALES}"))
    return tensor.dtype if dtype is None or is_quantized or not tensor.is_floating_point() else dtype


def texts_of(
    model: Blip2 | Blip2Matcher,
    tokenizer: Path | str | None,
    quantization: dict[str, Any] | None,
    settings: ImageSettings | None,
    qformer_tokenizer: Path | str | None = None,
) -> dict[str, str]:
    """The small files and what is in them, config.json last."""
    texts = {}
    is_instruct = isinstance(model.config, Blip2Config) and model.config.reads_prompt
    if is_instruct and qformer_tokenizer is None and isinstance(tokenizer, Path):
        qformer_tokenizer = tokenizer.parent / QFORMER_TOKENIZER / tokenizer.name
    for place, given in (("", tokenizer), (f"{QFORMER_TOKENIZER}/", qformer_tokenizer)):
        if given is not None:
            texts[f"{place}tokenizer.json"] = read_text(given) if isinstance(given, Path) else given
            texts[f"{place}tokenizer_config.json"] = _json({"tokenizer_class": "PreTrainedTokenizerFast"})
    settings = settings or ImageSettings(model.config.vision.image_size)
    texts["preprocessor_config.json"] = _json(preprocessor_json(settings))
    name = "InstructBlipProcessor" if is_instruct else "Blip2Processor"
    processor = {"processor_class": name, "num_query_tokens": model.config.qformer.num_query_tokens}
    texts["processor_config.json"] = _json(processor)
    if isinstance(model.config, Blip2Config):
        texts["generation_config.json"] = _json(_generation(model.config))
    texts["config.json"] = _json(config_json(model.config, quantization))
    return texts


def _generation(config: Blip2Config) -> dict[str, Any]:
    language = config.language
    start = (
        {"bos_token_id": language.eos_token_id, "decoder_start_token_id": language.decoder_start_token_id}
        if isinstance(language, T5Config)
        else {"bos_token_id": language.bos_token_id}
    )
    ends = language.end_token_ids
    return start | {"eos_token_id": ends[0] if len(ends) == 1 else [*ends], "pad_token_id": language.pad_token_id}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
