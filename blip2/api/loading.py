"""`load`: a model by name, ready for use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch

from blip2 import checkpoint, placement
from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline
from blip2.checkpoint.adapters import Adapters, Asked
from blip2.config import Blip2Config
from blip2.errors import CheckpointError, OptionError, option
from blip2.image import MAX_PIXELS, Reading
from blip2.model import Blip2
from blip2.template import ChatTemplate
from blip2.text import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadOptions(TypedDict, total=False):
    """The keywords of `load`."""

    device: str
    dtype: str | torch.dtype | None
    quantize: str | None
    quantize_vision: bool
    vision: str | None
    adapter: Asked | None
    chat_template: bool
    revision: str | None
    max_pixels: int
    allow_truncated: bool
    progress: Callable[[int, int], None] | None


@overload
def load(name: None = None, **options: Unpack[LoadOptions]) -> Pipeline: ...
@overload
def load(name: str | Path, **options: Unpack[LoadOptions]) -> Any: ...
def load(
    name: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    quantize_vision: bool = False,
    vision: str | None = None,
    adapter: Asked | None = None,
    chat_template: bool = False,
    revision: str | None = None,
    max_pixels: int = MAX_PIXELS,
    allow_truncated: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pipeline | Matcher:
    """Load a model: a `Pipeline` (captions, questions, chat) or a `Matcher` (image-text matching).

    ``name``: None for the bundled miniature ("miniature-itm" for the matching one), the folder of a checkpoint, or
    its name on the Hugging Face hub (``revision``: a branch, tag or commit there). The files decide which of the two
    classes is returned. ``device``: "auto" uses the GPU if there is one and keeps what does not fit on the CPU (see
    `blip2.placement`). ``dtype``: "float32", "bfloat16" or "float16"; the default suits the device. ``quantize``:
    "int8" or "int4" for the language model's weights; ``quantize_vision`` adds the image encoder's. ``vision``:
    "int8" runs the image encoder with 8-bit weights and activations, which is faster on a CPU with VNNI.
    ``adapter``: a LoRA or DoRA in the format of `peft` (folder or name on the hub), a list of them, or a dictionary
    with their weights; they are merged while the weights are read. ``chat_template``: format questions with the
    language model's own chat template instead of BLIP-2's; it runs in a sandbox (`blip2.template`). ``max_pixels``
    and ``allow_truncated``: which images are accepted, see `image.load_image`. ``progress`` is called with the bytes of
    weights that are loaded, and with their total.

    Raises CheckpointError if the model does not exist or is incomplete, OptionError for an unavailable device or
    precision.
    """
    reading = Reading(max_pixels=max_pixels, allow_truncated=allow_truncated)
    chosen = checkpoint.quantization(quantize, vision=quantize_vision, images=vision)
    where = device if device == "auto" else str(find_device(device))
    folder = checkpoint.resolve(name, revision=revision)
    adapters = Adapters.of(adapter)
    # Check the small files before reading the large ones.
    config = checkpoint.read_config(folder)
    tokenizer, settings = Tokenizer.from_folder(folder), checkpoint.image_settings(folder, config)
    reads_prompt = isinstance(config, Blip2Config) and config.reads_prompt
    instruction_tokenizer = Tokenizer.from_folder(folder / checkpoint.QFORMER_TOKENIZER) if reads_prompt else None
    if chat_template and not isinstance(config, Blip2Config):
        raise OptionError(f"{option('chat_template')} is for generative models, and {name} is a matching model")
    if chat_template and reads_prompt:
        raise OptionError(
            f"{option('chat_template')} is not for an InstructBLIP such as {name}, whose Q-Former reads the question "
            "itself; leave it out"
        )
    template = ChatTemplate.from_folder(folder, tokenizer.special_names()) if chat_template else None
    plan = placement.plan_for(folder, device=where, dtype=find_dtype(dtype), quantize=chosen)
    model = placement.load(folder, plan, quantize=chosen, adapters=adapters, progress=progress)
    called = str(name) if name is not None else "miniature"
    if isinstance(model, Blip2):
        return Pipeline(
            model, tokenizer, settings,
            name=called, reading=reading, instruction_tokenizer=instruction_tokenizer, template=template,
        )  # fmt: skip
    return Matcher(model, tokenizer, settings, name=called, reading=reading)


def as_pipeline(found: Pipeline | Matcher) -> Pipeline:
    """What `load` returned, if it is generative; else CheckpointError."""
    if not isinstance(found, Pipeline):
        raise CheckpointError(
            f"{found.name} is a matching model, which compares images with texts and generates nothing; "
            "name a generative model, such as Salesforce/blip2-opt-2.7b, or none for the bundled miniature"
        )
    return found


def as_matcher(found: Pipeline | Matcher) -> Matcher:
    """What `load` returned, if it is a matching model; else CheckpointError."""
    if not isinstance(found, Matcher):
        raise CheckpointError(
            f"{found.name} is a generative model, which cannot compare images with texts; name a matching model, such "
            "as Salesforce/blip2-itm-vit-g, or none for the bundled miniature-itm"
        )
    return found


def find_device(device: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. OptionError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("it does not compute")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].partition("Expected one of")[0].rstrip(".") or "there is no such kind"
        if reason.startswith("Could not run"):  # a long text about operators
            reason = "this torch is not built for it"
        raise OptionError(
            f"{option('device')} {device!r} cannot be used ({reason}); use auto, cpu, cuda or cuda:N"
        ) from None
    return found


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name; OptionError for another name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise OptionError(f"{option('dtype')} {dtype!r} is not a precision for this model; use {', '.join(DTYPES)}")
    return DTYPES[dtype]


def manner_of(model: str | Path | Pipeline | None) -> str:
    """The prompt format (`text.question_prompt`), as far as it is known without loading: "instruct" for a local
    InstructBLIP, else "opt", whose rules apply to all others."""
    if isinstance(model, Pipeline):
        return model.speaker.model.config.manner
    try:
        config = checkpoint.read_config(checkpoint.resolve(model, local_files_only=True))
    except CheckpointError:  # reported when the model is loaded
        return "opt"
    return "instruct" if isinstance(config, Blip2Config) and config.reads_prompt else "opt"
