"""Assembles a model for training from separate parts.

A frozen image encoder and a frozen language model are taken as published. Between them is a Q-Former that starts from a
BERT, from another BLIP-2's, or from scratch, with new heads and a new projection.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2.checkpoint.bert import ALIASES, bert_config, read_bert
from blip2.checkpoint.convolutions import LiteEncoder
from blip2.checkpoint.encoders import Encoder
from blip2.checkpoint.files import QFORMER_TOKENIZER
from blip2.checkpoint.frozen import frozen_files, is_same, models_in, parts_of
from blip2.checkpoint.lavis import Weights, frozen_part
from blip2.checkpoint.lavis_keys import TOGETHER
from blip2.checkpoint.load import empty_model
from blip2.checkpoint.names import resolve
from blip2.checkpoint.reader import find_tensors
from blip2.checkpoint.save import texts_of, write_model
from blip2.checkpoint.settings import read_config, read_json, read_language
from blip2.checkpoint.tensors import named_tensors
from blip2.config import Blip2Config, MatcherConfig, QFormerConfig
from blip2.errors import CheckpointError, OptionError, option
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer, added_token

SCRATCH = "scratch"
CAPTION_START = "[DEC]"
"""First token of a caption from the Q-Former; BERT does not have it."""
STD = 0.02
LANGUAGE = "language_model."
MAY_DIFFER = (".crossattention.", "query_tokens", "language_projection.")
"""Weights of another model's Q-Former that may have other shapes: for another image encoder, another number of query
tokens, or another language model."""
OF_WORDS = ("embeddings.word_embeddings.weight", "qformer_lm_head.bias")
"""Weights with a row for each token."""
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Start:
    """What a Q-Former starts from. ``tokenizer``: the content of tokenizer.json for its text; "" if there is none.
    ``is_bert``: whether tokenizer and embeddings lack `CAPTION_START`."""

    config: QFormerConfig
    tensors: Mapping[str, Tensor]
    tokenizer: str = ""
    is_bert: bool = False
    projection_size: int = MatcherConfig.projection_size
    """Size of the vectors that ITC compares."""


def qformer_start(name: str, tokenizer: str | None = None) -> Start:
    """``name``: a BERT, a BLIP-2 or an InstructBLIP, as a folder or on the hub, or "scratch". With "scratch",
    ``tokenizer`` is the folder of a BERT whose tokenizer is used, and whose size if it has a config.json. Raises
    CheckpointError, OptionError."""
    if name == SCRATCH:
        if tokenizer is None:
            return Start(QFormerConfig(), {}, is_bert=True)
        folder = resolve(ALIASES.get(tokenizer, tokenizer))
        text, config = _tokenizer(folder), QFormerConfig()
        if (folder / "config.json").exists():
            config = bert_config(folder)
        return Start(replace(config, vocab_size=added_token(text, CAPTION_START)[1]), {}, text, is_bert=True)
    if tokenizer is not None:
        raise OptionError(f"{option('tokenizer')} is for a Q-Former from scratch; {name} has its own")
    folder = resolve(ALIASES.get(name, name))
    if "qformer_config" not in read_json(folder / "config.json"):
        config, tensors = read_bert(folder)
        return Start(config, tensors, _tokenizer(folder), is_bert=True)
    model = read_config(folder)
    apart = {together: name for name, together in TOGETHER.items()}  # for an InstructBLIP
    found = {
        apart.get(key, key): place.read().float()
        for key, place in find_tensors(folder).items()
        if not key.startswith((LANGUAGE, "vision_model."))
    }
    if isinstance(model, Blip2Config):
        own = _tokenizer(folder / QFORMER_TOKENIZER) if model.reads_prompt else ""
        return Start(model.qformer, found, own)
    return Start(model.qformer, found, _tokenizer(folder), projection_size=model.projection_size)


def assemble(
    out: Path,
    *,
    vision: Encoder | LiteEncoder,
    qformer: Start,
    language: str | None = None,
    num_queries: int | None = None,
    seed: int = 0,
    link: Path | None = None,
) -> list[Path]:
    """Write models that training starts from: ``out/matching`` for stage 1, if the Q-Former has a tokenizer, and
    ``out/generative`` for stage 2, with a ``language`` model (a folder or a hub name). Returns their folders.

    New weights are initialised from ``seed``, equal for equal sizes. Frozen parts have files of their own. ``link``:
    another assembled or trained model (or the folder of two) whose files with identical frozen parts are shared by hard
    links. Raises CheckpointError for invalid parts, and OptionError if there is nothing to write or share.
    """
    if isinstance(vision, LiteEncoder):  # else the Q-Former could not tell left from right
        vision = replace(vision, config=replace(vision.config, has_positions=True))
    shared = [] if link is None else models_in(link)
    if link is not None:
        _check_disk(link, out)
    if not qformer.tokenizer and language is None:
        raise OptionError(
            f"there is nothing to write: name a {option('language')} model for stage 2, or for stage 1 a Q-Former with "
            f"a {option('tokenizer')}"
        )
    begun = replace(qformer.config, encoder_hidden_size=vision.config.hidden_size, has_text=False)
    if num_queries is not None:
        if not 1 <= num_queries <= 4096:
            raise OptionError(f"{option('queries')} is {num_queries}; it may be 1 to 4096")
        begun = replace(begun, num_query_tokens=num_queries)
    written = []
    if qformer.tokenizer:
        tokenizer, start = added_token(qformer.tokenizer, CAPTION_START)
        with_text = replace(begun, has_text=True, vocab_size=max(begun.vocab_size, start + 1))
        matcher = MatcherConfig(vision.config, with_text, qformer.projection_size, bos_token_id=start)
        written.append(_write(out / "matching", matcher, vision, qformer, {}, tokenizer, seed, shared))
    if language is not None:
        folder = resolve(language)
        whole = read_config(folder) if "qformer_config" in read_json(folder / "config.json") else None
        spoken = whole.language if isinstance(whole, Blip2Config) else read_language(folder)
        config = Blip2Config(vision=vision.config, qformer=begun, language=spoken)
        weights = frozen_part(folder, LANGUAGE, config.language.family)
        shared = [*shared, *written]
        tokenizer = _tokenizer(folder)
        written.append(_write(out / "generative", config, vision, qformer, weights, tokenizer, seed, shared, folder))
    return written


def _check_disk(link: Path, out: Path) -> None:
    """Hard links need both folders on one disk."""
    if _disk_of(link) != _disk_of(next(path for path in out.absolute().parents if path.exists())):
        raise OptionError(
            f"{option('link')}: {link} is on another disk than {out} and cannot be shared; write to the same disk, or "
            f"leave {option('link')} out"
        )


def _disk_of(path: Path) -> int:
    return os.stat(path).st_dev


def _write(
    folder: Path,
    config: Blip2Config | MatcherConfig,
    vision: Encoder | LiteEncoder,
    qformer: Start,
    language: Weights,
    tokenizer: str,
    seed: int,
    shared: list[Path],
    words: Path | None = None,
) -> Path:
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name another folder, or remove it")
    model = empty_model(config)
    for name, tensor in vision.tensors():
        place, _, last = name.rpartition(".")
        setattr(model.vision.get_submodule(place), last, nn.Parameter(tensor, requires_grad=False))
    sizes = {}
    for name, tensor in named_tensors(model):
        if name.startswith(LANGUAGE):
            _check(name, language, tensor, folder)
            sizes[name] = language[name].num_bytes
        else:
            if tensor.is_meta:
                _kept(name, tuple(tensor.shape), qformer)  # before anything is written
            sizes[name] = tensor.numel() * (4 if tensor.is_meta else tensor.itemsize)
    linked = _linked(model, language, shared)
    write_model(
        folder,
        [(name, size) for name, size in sizes.items() if name not in linked],
        _values(model, qformer, language, linked, torch.Generator().manual_seed(seed)),
        texts_of(model, tokenizer, None, vision.settings, words=words),
        apart=True,
        linked=linked,
    )
    return folder


def _linked(model: Blip2 | Blip2Matcher, language: Weights, shared: list[Path]) -> dict[str, Path]:
    """The file of each weight that another model shares: for each part, if all of it is identical."""
    own = dict(named_tensors(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    linked: dict[str, dict[str, Path]] = {}
    for folder in shared:
        for stem, places in parts_of(frozen_files(folder), shapes).items():
            if stem not in linked and all(
                is_same(place, language[name].read() if name in language else own[name])
                for name, place in places.items()
            ):
                linked[stem] = {name: place.path for name, place in places.items()}
    return {name: path for files in linked.values() for name, path in files.items()}


def _values(
    model: Blip2 | Blip2Matcher,
    qformer: Start,
    language: Weights,
    linked: Mapping[str, Path],
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """The weights that are not ``linked``."""
    for name, tensor in named_tensors(model):
        if name in linked:
            continue
        if name.startswith(LANGUAGE):
            yield name, language[name].read()
        elif not tensor.is_meta:
            yield name, tensor
        else:
            yield name, _begun(name, tuple(tensor.shape), qformer, generator)


def _begun(name: str, shape: tuple[int, ...], qformer: Start, generator: torch.Generator) -> Tensor:
    """The initial value of a weight of the Q-Former, its heads or the projection."""
    new = _new(name, shape, generator)  # always drawn, so that later weights do not depend on it
    if (found := _kept(name, shape, qformer)) is None:
        return new
    return found.clone() if found.shape == shape else torch.cat([found, new[len(found) :]])  # a value for each name


def _kept(name: str, shape: tuple[int, ...], qformer: Start) -> Tensor | None:
    """The existing value, perhaps without its last rows; None for a new weight. Raises CheckpointError for another
    shape."""
    if (found := qformer.tensors.get(name)) is None or found.shape == shape:
        return found
    if qformer.is_bert and name in OF_WORDS and found.shape[1:] == shape[1:] and len(found) < shape[0]:
        return found  # the last rows are missing
    if any(part in name for part in MAY_DIFFER):
        return None
    raise CheckpointError(f"{name} of the Q-Former has shape {list(found.shape)}, but needs {list(shape)}; use another "
        "Q-Former")


def _new(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """BERT's initialisation, also for query tokens; the temperature as in LAVIS."""
    if name == "temp":
        return torch.full(shape, 0.07)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * STD


def _check(name: str, weights: Weights, wanted: Tensor, folder: Path) -> None:
    if (found := weights.get(name)) is None:
        raise CheckpointError(
            f"{name.removeprefix(LANGUAGE)} is missing in the language model for {folder}; its weights and config.json "
            "do not match"
        )
    if found.shape != tuple(wanted.shape):
        raise CheckpointError(
            f"{found.place}: {name.removeprefix(LANGUAGE)} has shape {list(found.shape)}, but its config.json requires "
            f"{list(wanted.shape)}"
        )


def _tokenizer(folder: Path) -> str:
    path = folder / TOKENIZER
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; create it with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return Tokenizer.from_folder(folder).to_json()
