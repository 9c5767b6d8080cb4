"""Loads a model: built without memory, then filled one tensor at a time.

A tensor is read (while the previous one is processed), checked, cast or quantised, moved to its device, and released,
so that the peak is the finished model and one or two tensors. Missing or unexpected weights and wrong shapes are
errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blip2.checkpoint.adapters import Adapters
from blip2.checkpoint.keys import Config, aliases, is_ignored, is_transposed, published_names, rows_of_parts
from blip2.checkpoint.precision import Precision, choose_precision
from blip2.checkpoint.quantize import (
    CODES,
    OUTPUT,
    SCALES,
    Quantization,
    has_table_as_head,
    put_linears,
    quantization,
    quantization_in,
)
from blip2.checkpoint.reader import Place, find_tensors, read_ahead, release_memory
from blip2.checkpoint.settings import read_config, read_json, read_language
from blip2.checkpoint.tensors import names_in_files
from blip2.config import Blip2Config, LanguageConfig, MatcherConfig, T5Config
from blip2.errors import CheckpointError, NotFiniteError
from blip2.finite import is_finite
from blip2.language import Language, build_language_model
from blip2.linear import Linear, Table
from blip2.model import Blip2, Blip2Matcher
from blip2.quantized import QuantizedLinear

Progress = Callable[[int, int], None]
TRIM_BYTES = 2**29
TABLE = "language.token_embedding.weight"
TABLES = (TABLE, "qformer.word_embedding.weight")
Devices = Mapping[str, torch.device | str | int]


def load(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    devices: Devices | None = None,
    dtype: torch.dtype | None = None,
    vision_dtype: torch.dtype | None = None,
    quantize: Quantization | str | None = None,
    as_stored: bool = False,
    pickles: bool = False,
    prepare: Callable[[Blip2 | Blip2Matcher], None] | None = None,
    adapters: Adapters | None = None,
    progress: Progress | None = None,
) -> Blip2 | Blip2Matcher:
    """The model in a folder of the published layout, in evaluation mode, generative or matching.

    ``dtype`` applies to the image encoder and the language model (see `choose_precision`), ``vision_dtype`` to the
    former if different; ``as_stored`` keeps every weight in the dtype of the file instead. ``quantize`` quantises
    weights that are not quantised in the file. ``pickles``: whether to read the tensors of .bin files if a folder has
    only those. ``prepare`` is called with the empty model and may split layers that are several in the files.
    ``adapters`` are merged before quantisation (see `checkpoint.adapters`). ``devices`` gives devices for parts and
    layers, by prefixes of our names ("" is the rest), instead of ``device``. ``progress`` is called with bytes done and
    bytes in all. Raises `CheckpointError` that names file and key.
    """
    model = _load(
        folder, read_config(folder), device=device, devices=devices, dtype=dtype, vision_dtype=vision_dtype,
        quantize=quantize, as_stored=as_stored, pickles=pickles, prepare=prepare, adapters=adapters, progress=progress,
    )  # fmt: skip
    assert isinstance(model, Blip2 | Blip2Matcher)
    return model


def load_language(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Quantization | str | None = None,
    as_stored: bool = False,
    pickles: bool = False,
    progress: Progress | None = None,
) -> Language:
    """A language model alone, from its own published files; the options are those of `load`."""
    model = _load(
        folder, read_language(folder), device=device, dtype=dtype, quantize=quantize, as_stored=as_stored,
        pickles=pickles, progress=progress,
    )  # fmt: skip
    return model.language


def _load(
    folder: Path,
    config: Config,
    *,
    device: str | torch.device,
    devices: Devices | None = None,
    dtype: torch.dtype | None,
    vision_dtype: torch.dtype | None = None,
    quantize: Quantization | str | None,
    as_stored: bool,
    pickles: bool,
    prepare: Callable[[Any], None] | None = None,
    adapters: Adapters | None = None,
    progress: Progress | None,
) -> Any:
    if isinstance(quantize, str):
        quantize = quantization(quantize)
    stored = quantization_in(folder)
    quantize = quantization_in(folder, quantize)
    model = empty_model(config)
    precision = choose_precision(
        config,
        torch.device(device),
        dtype,
        num_parameters=count_parameters(model),
        quantization=quantize,
    )
    precision = replace(precision, vision=vision_dtype or precision.vision)
    put_linears(model, quantize)
    if prepare is not None:
        prepare(model)
    tensors = find_tensors(folder, pickles=pickles)
    steps = list(_steps(model, config, tensors, folder, stored))
    if adapters is not None:
        assert isinstance(config, Blip2Config | MatcherConfig)
        adapters = _fitted(adapters, steps, config, folder, stored)
        model.config = replace(config, adapted=adapters.digest or config.adapted)
    # The largest first: once most of the model is in memory, temporary tensors are small.
    steps.sort(key=lambda step: sum(place.num_bytes for place in step.places), reverse=True)
    total = sum(place.num_bytes for step in steps for place in step.places)
    _check_tied(tensors, folder, aliases(config))
    done = 0
    for step, tensor in zip(steps, read_ahead([step.places for step in steps]), strict=True):
        where = _device_of(step.name, devices, device)
        try:
            if is_transposed(config, step.name):
                tensor = tensor.T.contiguous()
            if adapters is not None:
                rows = {name: sum(place.shape[:1]) for name, place in zip(step.sources, step.places, strict=True)}
                tensor = adapters.merged(rows, tensor)
                tensor = tensor.to(step.places[0].dtype) if as_stored else tensor
            _fill(model, step, tensor, where, None if as_stored else precision)
        except NotFiniteError as error:
            sources = list(zip(step.sources, step.places, strict=True))
            name, place = next((source for source in sources if not is_finite(source[1].read())), sources[0])
            raise CheckpointError(f"{place.path}: {name}: {error}; fetch the file again") from None
        del tensor
        before, done = done, done + sum(place.num_bytes for place in step.places)
        if done // TRIM_BYTES > before // TRIM_BYTES or done == total:
            release_memory()
        if progress is not None:
            progress(done, total)
    return model.eval()


def fitted_adapters(adapters: Adapters, folder: Path) -> Adapters:
    """As `Adapters.fitted`, for the model in a folder; no weight is read. Raises `CheckpointError`."""
    config, stored = read_config(folder), quantization_in(folder)
    steps = list(_steps(empty_model(config, stored), config, find_tensors(folder), folder, stored))
    return _fitted(adapters, steps, config, folder, stored)


def _fitted(
    adapters: Adapters, steps: list[_Step], config: Config, folder: Path, stored: Quantization | None
) -> Adapters:
    if stored is not None:
        raise CheckpointError(f"{folder}: is already quantised to {stored.bits} bits; merge adapters into the original")
    shapes = {
        name: place.shape[::-1] if is_transposed(config, step.name) else place.shape
        for step in steps
        for name, place in zip(step.sources, step.places, strict=True)
    }
    tables = {name for step in steps if step.name in TABLES for name in step.sources}
    return adapters.fitted(shapes, tables, folder)


class LanguageOnly(nn.Module):
    """A language model with the name that it has in a `Blip2`."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.language = build_language_model(config)


def empty_model(config: Config, quantize: Quantization | None = None) -> Any:
    """The model on the meta device: all names and shapes, no memory."""
    kinds: dict[type, Callable[[Any], nn.Module]] = {Blip2Config: Blip2, MatcherConfig: Blip2Matcher}
    with torch.device("meta"), _Uninitialised():
        model = kinds.get(type(config), LanguageOnly)(config)
    put_linears(model, quantize)
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of a model's weights, including quantised ones; tied weights count once."""
    quantized = [
        module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and not (name == OUTPUT and has_table_as_head(model))
    ]
    plain = sum(parameter.numel() for parameter in model.parameters())
    return plain + sum(module.in_features * module.out_features for module in quantized)


class _Uninitialised(TorchFunctionMode):
    """Skips initialisation of weights that will be loaded; on the meta device it would import half of a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Step:
    """A parameter, and the places of the tensors that are concatenated to it."""

    name: str
    sources: list[str]
    """Names of these tensors in the files."""
    places: list[Place]


def _steps(
    model: nn.Module,
    config: Config,
    tensors: dict[str, Place],
    folder: Path,
    stored: Quantization | None,
) -> Iterator[_Step]:
    """The steps that fill all weights of the model. Every tensor of the files is accounted for, and shapes are
    checked."""
    names = names_in_files(model, config, stored)
    for ours, theirs in _sources(names, tensors, folder, config).items():
        module_name, _, last = ours.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, QuantizedLinear) and last == "weight":
            wanted = (module.out_features, module.in_features)
        else:
            wanted = tuple(getattr(module, last).shape)
        places = [tensors[name] for name in theirs]
        asked = [wanted[::-1] if is_transposed(config, ours) else wanted]
        if len(places) > 1:
            asked = [(rows, *wanted[1:]) for rows in rows_of_parts(config, ours, wanted[0], len(places))]
        for name, place, shape in zip(theirs, places, asked, strict=True):
            if place.shape != shape or place.dtype != places[0].dtype:
                raise CheckpointError(
                    f"{folder}: {name} has shape {list(place.shape)}, but config.json requires {list(shape)}; the "
                    "weights belong to another configuration"
                )
        yield _Step(ours, theirs, places)


def _sources(names: dict[str, str], tensors: dict[str, Place], folder: Path, config: Config) -> dict[str, list[str]]:
    """Our names to names in the files; every tensor is accounted for."""
    unused = {name for name in tensors if not is_ignored(name)}
    others = aliases(config)
    sources: dict[str, list[str]] = {}
    missing = []
    for ours, theirs in names.items():
        wanted = [theirs] if theirs.endswith((CODES, SCALES)) else published_names(theirs)
        sources[ours] = []
        for name in wanted:
            present = [alias for alias in (name, *others.get(name, ())) if alias in unused]
            unused.difference_update(present)
            if present:
                sources[ours].append(present[0])
            else:
                missing.append(name)
    if missing == [names.get("language.output.weight")] and _is_tied(folder, config):
        sources["language.output.weight"] = sources["language.token_embedding.weight"]
        missing = []
    for what, keys in (("missing", missing), ("unexpected", sorted(unused))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{folder}: {keys[0]}{more} {'is' if len(keys) == 1 else 'are'} {what}; the weights and config.json do "
                "not match"
            )
    return sources


def _check_tied(tensors: dict[str, Place], folder: Path, twins: dict[str, tuple[str, ...]]) -> None:
    """Check that a tensor under two names is the same in both, so that a separate head is not lost."""
    for first, others in twins.items():
        present = [name for name in (first, *others) if name in tensors]
        for other in present[1:]:
            if not torch.equal(tensors[present[0]].read(), tensors[other].read()):
                raise CheckpointError(
                    f"{folder}: {other} differs from {present[0]}, with which it is tied in this architecture; the "
                    "weights belong to another model"
                )


def _is_tied(folder: Path, config: Config) -> bool:
    """Whether an output layer that is not in the files is tied to the embeddings."""
    content = read_json(folder / "config.json")
    language = config
    if isinstance(config, Blip2Config):
        content, language = content.get("text_config") or {}, config.language
    return isinstance(language, T5Config) and (language.scales_output or bool(content.get("tie_word_embeddings")))


def _device_of(name: str, devices: Devices | None, default: str | torch.device) -> torch.device:
    for end in range(len(name), -1, -1):
        prefix = name[:end]
        if devices and prefix in devices and (end in (0, len(name)) or name[end] == "."):
            return torch.device(devices[prefix])
    return torch.device(default)


def _fill(model: nn.Module, step: _Step, tensor: Tensor, device: torch.device, precision: Precision | None) -> None:
    """Put a tensor into its parameter, without ``precision`` in the dtype of the file."""
    module_name, _, last = step.name.rpartition(".")
    module = model.get_submodule(module_name)
    # These are small and fast to check; and a bias of minus infinity only disables a neuron, which no answer would
    # show.
    if (tensor.dim() < 2 or "_bias." in step.name or last == SCALES) and not is_finite(tensor):
        raise NotFiniteError(f"a {'scale' if last == SCALES else 'weight'} is NaN or infinite")
    if isinstance(module, QuantizedLinear) and last in (CODES, SCALES):
        setattr(module, last, tensor.to(device))
        return
    dtype = tensor.dtype if precision is None else precision.of(step.name)
    if step.name == TABLE and has_table_as_head(model) and model.language.output is not None:
        cast("QuantizedLinear", model.language.output).fill(tensor.to(dtype), device)
    if isinstance(module, Linear | Table) and last == "weight":
        module.keep(tensor.to(device, dtype), packs=precision is not None)
    elif isinstance(module, QuantizedLinear) and last == "weight":
        module.fill(tensor, device)
    else:  # the bias of a quantised layer is added to fp32 sums
        dtype = torch.float32 if isinstance(module, QuantizedLinear) else dtype
        setattr(module, last, nn.Parameter(tensor.to(device, dtype)))
