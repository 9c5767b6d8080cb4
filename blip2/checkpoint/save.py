"""Saves a model in the published layout, atomically: an existing model is kept until the end.

Weights are written one file at a time, of at most 5 GB as on the hub, so that the peak is the model and one file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blip2.checkpoint.files import INDEX, QFORMER_TOKENIZER, TRAINED, WEIGHTS
from blip2.checkpoint.frozen import FROZEN, frozen_files, parts_of, stem_of
from blip2.checkpoint.preprocessor import ImageSettings, preprocessor_json
from blip2.checkpoint.quantize import CODES, SCALES, quantization_of
from blip2.checkpoint.reader import places_in
from blip2.checkpoint.settings import config_json
from blip2.checkpoint.tensors import named_tensors
from blip2.config import Blip2Config, T5Config
from blip2.disk import link_or_copy, replace
from blip2.errors import CheckpointError
from blip2.model import Blip2, Blip2Matcher
from blip2.plaintext import read_text
from blip2.template import FILE as CHAT_TEMPLATE
from blip2.template import template_in

MAX_SHARD_SIZE_BYTES = 5 * 10**9
STEMS = "|".join(("model", TRAINED, *FROZEN.values()))
OURS = re.compile(rf"({STEMS})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?(\.part)?")


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
    frozen: Path | None = None,
    learnt: Collection[str] = (),
) -> None:
    """Write config.json, the weights and the files of the processors into ``folder``.

    ``tokenizer``: path or content of a tokenizer.json; likewise ``qformer_tokenizer`` for an InstructBLIP, by default
    the one in its own folder beside it. ``dtype``: cast the weights (None: unchanged), except for quantised ones.
    Weights above ``max_shard_size_bytes`` are split into several files with an index. ``quantization``: the description
    in config.json (see `read_quantization`); by default that of the model's layers. ``settings``: the image
    preprocessing; by default that of the published models. ``frozen``: the folder of a model with the same image
    encoder and language model. If they have files of their own there (see `checkpoint.frozen`), these are linked
    instead of written. ``learnt``: those of the two ("vision_model") that have changed, and are written.

    Everything is written to temporary names, synced, then renamed, config.json last; then leftover files of an earlier
    save are removed. Raises `CheckpointError` if the disk is full or the folder is not writable; an existing model is
    then unchanged, and no temporary file remains.
    """
    if quantization is None and (found := quantization_of(model)) is not None:
        quantization = found.as_json()
    linked: dict[str, Path] = {}
    if frozen is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
        for stem, places in parts_of(frozen_files(frozen), shapes).items():
            linked |= {name: place.path for name, place in places.items() if stem not in learnt}

    def own() -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in named_tensors(model) if name not in linked)

    sizes = [(name, tensor.numel() * _dtype(name, tensor, dtype).itemsize) for name, tensor in own()]
    tensors = ((name, tensor.to("cpu", _dtype(name, tensor, dtype))) for name, tensor in own())
    texts = texts_of(model, tokenizer, quantization, settings, qformer_tokenizer)
    write_model(folder, sizes, tensors, texts, max_shard_size_bytes, apart=bool(linked), linked=linked)


def write_model(
    folder: Path,
    sizes: list[tuple[str, int]],
    tensors: Iterator[tuple[str, Tensor]],
    texts: dict[str, str],
    max_shard_size_bytes: int = MAX_SHARD_SIZE_BYTES,
    *,
    apart: bool = False,
    linked: Mapping[str, Path] | None = None,
) -> None:
    """Write tensors and small files, config.json last; ``sizes`` in bytes, in order, determine the shards.

    Only one file's tensors are in memory at a time. ``apart``: each frozen part has files of its own. ``linked``: files
    of other models, with only frozen weights, that contain the tensors with these names. For the rest see `save`.
    """
    linked = linked or {}
    files = _split(sizes, max_shard_size_bytes, apart)
    places = {name: file for file, names in files.items() for name in names}
    places |= {name: path.name for name, path in linked.items()}
    early: dict[str, Tensor] = {}
    num_bytes = 0
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, names in files.items():
            written.append(folder / f"{file}.part")
            chosen = {}
            for name in names:
                while name not in early:
                    found, tensor = next(tensors)
                    early[found] = tensor.contiguous()
                chosen[name] = early.pop(name)
            save_file(chosen, written[-1], metadata={"format": "pt"})
            num_bytes += sum(tensor.nbytes for tensor in chosen.values())
            del chosen
        for path in sorted(set(linked.values())):
            written.append(folder / f"{path.name}.part")
            link_or_copy(path, written[-1])
            num_bytes += sum(place.num_bytes for place in places_in(path).values())
        if set(places.values()) != {WEIGHTS}:
            texts = {INDEX: _json({"metadata": {"total_size": num_bytes}, "weight_map": places})} | texts
        for file, text in texts.items():
            written.append(folder / f"{file}.part")
            written[-1].parent.mkdir(exist_ok=True)
            written[-1].write_text(text, encoding="utf-8")
        for part in written:
            # safetensors gives access to the owner only; a model gets the permissions of the other files.
            shutil.copymode(written[-1], part)
        replace([(part, part.with_suffix("")) for part in written])
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: the model cannot be written ({reason}); free some space there, or save to another folder"
        ) from None
    finally:
        for part in written:
            part.unlink(missing_ok=True)
    for old in folder.iterdir():
        if OURS.fullmatch(old.name) and old.name not in {*places.values(), *texts}:
            old.unlink()


def _split(sizes: list[tuple[str, int]], limit: int, apart: bool) -> dict[str, list[str]]:
    """Tensors to files in order, each file as full as the limit allows; a larger tensor has a file of its own."""
    if apart:
        parts: dict[str, list[tuple[str, int]]] = {}
        for name, size in sizes:
            parts.setdefault(stem_of(name), []).append((name, size))
        return {file: names for stem, part in parts.items() for file, names in _shards(part, limit, stem).items()}
    return _shards(sizes, limit, "model")


def _shards(sizes: list[tuple[str, int]], limit: int, stem: str) -> dict[str, list[str]]:
    groups: list[list[str]] = []
    left = -1
    for name, size in sizes:
        if size > left or not groups:
            groups.append([])
            left = limit
        groups[-1].append(name)
        left -= size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write; the two tensors of a quantised weight are unchanged."""
    is_quantized = name.endswith((f".{CODES}", f".{SCALES}"))
    return tensor.dtype if dtype is None or is_quantized or not tensor.is_floating_point() else dtype


def texts_of(
    model: Blip2 | Blip2Matcher,
    tokenizer: Path | str | None,
    quantization: dict[str, Any] | None,
    settings: ImageSettings | None,
    qformer_tokenizer: Path | str | None = None,
    words: Path | None = None,
) -> dict[str, str]:
    """The small files with their content, config.json last. ``words``: a folder whose chat template is included; by
    default the tokenizer's."""
    if words is None and isinstance(tokenizer, Path):
        words = tokenizer.parent
    texts = {}
    is_instruct = isinstance(model.config, Blip2Config) and model.config.reads_prompt
    if is_instruct and qformer_tokenizer is None and isinstance(tokenizer, Path):
        qformer_tokenizer = tokenizer.parent / QFORMER_TOKENIZER / tokenizer.name
    names, template = ({}, None) if words is None or tokenizer is None else template_in(words)
    for place, given, more in (("", tokenizer, names), (f"{QFORMER_TOKENIZER}/", qformer_tokenizer, {})):
        if given is not None:
            texts[f"{place}tokenizer.json"] = read_text(given) if isinstance(given, Path) else given
            texts[f"{place}tokenizer_config.json"] = _json({"tokenizer_class": "PreTrainedTokenizerFast"} | more)
    texts |= {} if template is None else {CHAT_TEMPLATE: template}
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
