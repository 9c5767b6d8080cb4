"""Conversion between the authors' files, ``.pth`` of LAVIS, and folders in the published layout.

A LAVIS file is ``{"model": {name: tensor}}`` with the trained weights: the Q-Former, its query tokens and heads, the
norm of the patch features and the projection; the image encoder only if it was trained. Frozen parts are stored
separately: the image encoder in its own file, the language model in its own repository. `convert_from_lavis` combines
them; `convert_to_lavis` writes what LAVIS would write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from blip2.checkpoint.files import QFORMER_TOKENIZER, weight_files
from blip2.checkpoint.keys import ALIASES, IGNORED, INSTRUCT
from blip2.checkpoint.lavis_keys import POSITIONS, POST_NORM, family_of, to_authors, to_published
from blip2.checkpoint.load import empty_model
from blip2.checkpoint.names import resolve
from blip2.checkpoint.pickled import unpickled
from blip2.checkpoint.preprocessor import image_settings, preprocessor_json
from blip2.checkpoint.reader import find_tensors
from blip2.checkpoint.save import write_model
from blip2.checkpoint.settings import config_json, read_config, read_quantization
from blip2.checkpoint.tensors import named_tensors
from blip2.checkpoint.vision_fields import extra_fields
from blip2.config import CLIP_VIT_L, Blip2Config, ConvolutionalConfig, MatcherConfig, VisionConfig
from blip2.disk import written
from blip2.errors import CheckpointError
from blip2.plaintext import read_text
from blip2.published import PUBLISHED

Config = Blip2Config | MatcherConfig
Progress = Callable[[int, int], None]
"""Called with the number of finished weights and the number of all."""

FROZEN = {
    "vision_model.": "the image encoder (--vision): eva_vit_g.pth, clip_vit_L.pth, or a BLIP-2 model that contains it",
    "language_model.": "the language model (--language): the original one, such as google/flan-t5-xl, or a BLIP-2 "
        "model that contains it, in safetensors",
}
"""Parts that a LAVIS file may lack, by the prefix of their names, and where to get them."""
LANGUAGES = ("opt", "t5", "llama")
WORDS = {"opt": "language_model.model.decoder.embed_tokens.weight", "t5": "language_model.shared.weight"}
VISION_OF_WIDTH = {1408: VisionConfig(), 1024: CLIP_VIT_L}


class Weight(NamedTuple):
    """A weight that is read on demand, and its place."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    place: str
    num_bytes: int


Weights = dict[str, Weight]


def read_lavis(path: Path) -> dict[str, Tensor]:
    """The weights of a LAVIS file under their published names, on the CPU, memory-mapped.

    Raises `CheckpointError` if the file cannot be read, has more than tensors, or belongs to another model.
    """
    return to_published(_state(path), path)


def convert_from_lavis(
    path: Path,
    out_folder: Path,
    *,
    like: str | Path | None = None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert a LAVIS file to a folder in the published layout.

    ``like``: a model (a folder or a published name; by default the published model of the same kind) for the
    configuration, the tokenizer, the preprocessing, and each frozen part that is not found elsewhere. ``vision``: the
    image encoder: ``eva_vit_g.pth``, ``clip_vit_L.pth`` or a model. ``language``: the language model: the original or a
    BLIP-2 model. Weights keep their dtype. Raises `CheckpointError`, before anything is written, for missing or
    unexpected weights and wrong shapes, and if ``out_folder`` already has a model.
    """
    if (out_folder / "config.json").exists():
        raise CheckpointError(f"{out_folder}: already has a model; choose another folder, or delete it")
    state = _state(path)
    family, trained = family_of(state), _in_memory(to_published(state, path), path)
    reads_prompt = family is not None and INSTRUCT["qformer.word_embedding.weight"] in trained
    like_folder = resolve(like or _published_like(family, reads_prompt, trained, path))
    like_config = _config(like_folder)
    _check_kind(family, reads_prompt, like_config, path, like_folder)

    found = dict(trained)
    has_weights = any((like_folder / file).exists() for file in weight_files(like_folder))
    for part, given in (("vision_model.", vision), ("language_model.", language)):
        place = given or (like_folder if has_weights else None)
        if place and not _names(found, part):  # never parts of two models mixed
            found |= frozen_part(place, part, family)
    config = _fitted(like_config, family, trained, found)
    assert isinstance(config.vision, VisionConfig)
    is_clip = config.vision.has_pre_norm
    wanted = _wanted(config)
    _check(found, wanted, path)
    for name in sorted(trained.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: {name} does not occur in {like_folder}; name a model of the same kind (--like)")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, shape) in enumerate(wanted.items(), start=1):
            tensor = found[name].read()
            if tensor.shape != shape:
                tensor = _resized(tensor, shape[1], align_corners=is_clip)
            if progress is not None:
                progress(done, len(wanted))
            yield name, tensor

    sizes = [(name, 4 * math.prod(shape)) for name, shape in wanted.items()]  # an upper bound: most are float32
    write_model(out_folder, sizes, tensors(), _companions(like_folder, like_config, config))


def convert_to_lavis(
    folder: str | Path, out_path: Path, *, trainable_only: bool = True, progress: Progress | None = None
) -> None:
    """Write a model's weights in LAVIS's format: ``{"model": {name: tensor}}``, readable with ``torch.load``.

    ``trainable_only`` leaves out the image encoder and the language model, as LAVIS does if they are frozen. Weights
    keep their dtype. Raises `CheckpointError` if the model does not match its configuration, or if ``out_path`` exists.
    """
    if out_path.exists():
        raise CheckpointError(f"{out_path}: exists already; choose another name, or delete it")
    folder = resolve(folder)
    config = _config(folder)
    if not trainable_only and extra_fields(config.vision):
        raise CheckpointError(f"{folder}: LAVIS has no image encoder of this kind; write only the trained weights")
    found, wanted = _with_tied_names(_in_folder(folder)), _wanted(config)
    _check(found, wanted, folder)
    known = wanted.keys() | set(IGNORED) | {alias for aliases in ALIASES.values() for alias in aliases} | ALIASES.keys()
    for name in sorted(found.keys() - known):
        raise CheckpointError(f"{folder}: {name} is unexpected; the weights and config.json do not match")
    names = [name for name in wanted if not (trainable_only and _part_of(name))]
    tensors: dict[str, Tensor] = {}
    for done, name in enumerate(names, start=1):
        tensors[name] = found[name].read()
        if progress is not None:
            progress(done, len(names))
    assert isinstance(config.vision, VisionConfig)
    state = to_authors(tensors, folder, family=_family(config), is_clip=config.vision.has_pre_norm)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(out_path) as unfinished:
        torch.save({"model": state}, unfinished)


def _state(path: Path) -> dict[str, Tensor]:
    """The content of "model" in a LAVIS file."""
    state = unpickled(path).get("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path}: has no weights under 'model', unlike LAVIS's files; it is another kind of file"
        )
    return state


def _in_memory(tensors: dict[str, Tensor], place: Path) -> Weights:
    return {
        name: Weight(tuple(tensor.shape), tensor.detach, str(place), tensor.nbytes) for name, tensor in tensors.items()
    }


def _in_folder(folder: Path) -> Weights:
    found = find_tensors(folder)
    return {name: Weight(place.shape, place.read, str(folder), place.num_bytes) for name, place in found.items()}


def frozen_part(place: str | Path, part: str, family: str | None) -> Weights:
    """The weights of one frozen part, from a file of the authors or from a model."""
    path = Path(place).expanduser()
    if path.is_file():
        content = unpickled(path)
        state = content["model"] if isinstance(content.get("model"), dict) else content
        state = {f"visual_encoder.{name.removeprefix('visual_encoder.')}": tensor for name, tensor in state.items()}
        found = _in_memory(to_published(state, path, strict=False), path)
    else:
        found = _in_folder(resolve(place))
        if part == "language_model." and "query_tokens" not in found:
            # A language model alone; some of OPT's files also lack the "model.".
            inner = "model." if family == "opt" and any(name.startswith("decoder.") for name in found) else ""
            found = {f"{part}{inner}{name}": weight for name, weight in found.items()}
    found = _with_tied_names(found)
    return {name: found[name] for name in _names(found, part)}


def _with_tied_names(found: Weights) -> Weights:
    """Each tied tensor under its first name, whichever of its names the file has."""
    first = {name: found[alias] for name, aliases in ALIASES.items() for alias in reversed(aliases) if alias in found}
    return first | found


def _part_of(name: str) -> str | None:
    """The frozen part that a published name belongs to."""
    return next((part for part in FROZEN if name.startswith(part) and not name.startswith(POST_NORM)), None)


def _names(found: Iterable[str], part: str) -> list[str]:
    return [name for name in found if _part_of(name) == part]


def _published_like(family: str | None, reads_prompt: bool, trained: Weights, path: Path) -> str:
    """The published model of the same kind and size."""
    bias = trained.get("language_projection.bias" if family else "vision_projection.bias")
    for name, published in PUBLISHED.items():
        config = published.config
        width = config.projection_size if isinstance(config, MatcherConfig) else config.language.hidden_size
        if bias is not None and (*_kind(config), width) == (family, reads_prompt, *bias.shape):
            return name
    raise CheckpointError(f"{path}: does not have the size of a published model; name a model with its configuration "
        "(--like)")


def _family(config: Config) -> str | None:
    return config.language.family if isinstance(config, Blip2Config) else None


def _kind(config: Config) -> tuple[str | None, bool]:
    """The family, and whether the Q-Former of a generative model reads the prompt."""
    return _family(config), isinstance(config, Blip2Config) and config.reads_prompt


def _config(folder: Path) -> Config:
    if read_quantization(folder) is not None:
        raise CheckpointError(f"{folder}: its weights are quantised; name the original model")
    config = read_config(folder)
    if isinstance(config, Blip2Config) and config.language.model_type not in LANGUAGES:
        raise CheckpointError(
            f"{folder}: its language model is a {config.language.kind}; the authors' format supports only OPT, T5 and "
            "Vicuna, so it cannot be converted"
        )
    if isinstance(config.vision, ConvolutionalConfig):
        raise CheckpointError(f"{folder}: its image encoder is convolutional, which the authors' format does not "
            "support")
    return config


def _check_kind(family: str | None, reads_prompt: bool, like: Config, path: Path, like_folder: Path) -> None:
    """Models of different families may have weights of the same sizes, so the kinds are compared."""
    kinds = {None: "a matching model (stage 1)", "opt": "with OPT", "t5": "with T5", "decoder": "with a Vicuna"}

    def kind(family: str | None, reads_prompt: bool) -> str:
        return f"{('an InstructBLIP ' if reads_prompt else 'a model ') if family else ''}{kinds[family]}"

    if _kind(like) != (family, reads_prompt):
        raise CheckpointError(
            f"{path}: is {kind(family, reads_prompt)}, but {like_folder} is {kind(*_kind(like))}; name a model of the "
            "same kind (--like)"
        )


def _fitted(like: Config, family: str | None, trained: Weights, found: Weights) -> Config:
    """The configuration of ``like``, adapted to the weights in known cases."""
    vision, qformer = like.vision, like.qformer
    assert isinstance(vision, VisionConfig)
    norm = trained.get(f"{POST_NORM}weight")
    if norm is not None and norm.shape[0] != vision.hidden_size and norm.shape[0] in VISION_OF_WIDTH:
        vision = replace(VISION_OF_WIDTH[norm.shape[0]], image_size=vision.image_size)
        qformer = replace(qformer, encoder_hidden_size=vision.hidden_size)
    if POSITIONS in trained:  # fine-tuned, perhaps on larger images
        vision = replace(vision, image_size=vision.patch_size * math.isqrt(trained[POSITIONS].shape[1] - 1))
    if isinstance(like, MatcherConfig):
        has_lm_head = any(name == "temp" or name.startswith("qformer_lm_head.") for name in trained)
        return replace(like, vision=vision, qformer=qformer, has_lm_head=has_lm_head)
    assert family is not None
    language = like.language
    if WORDS.get(family) in found:  # OPT's table was later padded to 50304 rows; the original has 50272
        language = replace(language, vocab_size=found[WORDS[family]].shape[0])
    return replace(like, vision=vision, qformer=qformer, language=language)


def _wanted(config: Config) -> dict[str, tuple[int, ...]]:
    """The published names of a model's weights, with shapes."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(empty_model(config))}


def _check(found: Weights, wanted: dict[str, tuple[int, ...]], path: Path) -> None:
    """Check that all weights exist with their shapes; position embeddings of another length are interpolated later."""
    for name, shape in wanted.items():
        part = _part_of(name)
        if part and not _names(found, part):
            raise CheckpointError(f"{path}: a part is missing; name {FROZEN[part]}")
        if name not in found:
            place = found[_names(found, part)[0]].place if part else path
            raise CheckpointError(f"{place}: {name} is missing; the file is incomplete, or belongs to another model")
        have = found[name].shape
        if have != shape and (name != POSITIONS or have[-1] != shape[-1]):
            raise CheckpointError(
                f"{found[name].place}: {name} has shape {list(have)}, not {list(shape)}; it belongs to a model of "
                "another size"
            )


def _resized(positions_1PD: Tensor, length: int, *, align_corners: bool) -> Tensor:
    """Position embeddings for ``length`` tokens, interpolated as in the authors' loader: bicubic, class token kept."""
    class_11D, grid_1PD = positions_1PD.float().split([1, positions_1PD.shape[1] - 1], dim=1)
    old, new = math.isqrt(grid_1PD.shape[1]), math.isqrt(length - 1)
    grid_1Dhw = grid_1PD.transpose(1, 2).unflatten(-1, (old, old))
    grid_1Dhw = F.interpolate(grid_1Dhw, (new, new), mode="bicubic", align_corners=align_corners)
    return torch.cat([class_11D, grid_1Dhw.flatten(2).transpose(1, 2)], dim=1)


def _companions(like_folder: Path, like: Config, config: Config) -> dict[str, str]:
    """The small files beside the weights, config.json last."""
    files = [*sorted(like_folder.iterdir()), *sorted((like_folder / QFORMER_TOKENIZER).glob("*"))]
    texts = {
        file.relative_to(like_folder).as_posix(): read_text(file)
        for file in files
        if file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".index.json")
    }
    settings = texts.pop("config.json")
    if config.vision.image_size != like.vision.image_size:
        size = replace(image_settings(like_folder), size=config.vision.image_size)
        texts["preprocessor_config.json"] = json.dumps(preprocessor_json(size), indent=2) + "\n"
    texts["config.json"] = settings if config == like else json.dumps(config_json(config), indent=2) + "\n"
    return texts


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` (`disk.written`); errors become `CheckpointError`."""
    try:
        with written(path, path.with_name(f"{path.name}.part")) as unfinished:
            yield unfinished
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch's error for a full disk
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be written ({reason}); free space, or write elsewhere") from None
