"""`load`: the front door for Python. A model by its name, ready to be asked about pictures."""

from __future__ import annotations

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
) -> Pipeline | Matcher:
    """A `Pipeline`, which captions, answers and chats, or a `Matcher`, which compares images with texts.

    ``name``: None for the miniature that comes with the package ("miniature-itm" for the matching one), the folder of
    a checkpoint, or its name on the Hugging Face hub (``revision``: a tag or commit there); what is there decides
    which of the two it is. ``device``: "auto" takes the GPU if there is one, and what does not fit on it stays on the
    CPU (see `blip2.placement`). ``dtype``: "float32", "bfloat16" or "float16"; by default what suits the device.
    ``quantize``: "int8" or "int4" for the language model's weights, with ``quantize_vision`` for the image encoder's,
    too. ``vision``: "int8" for an image encoder that multiplies in 8 bits, which on a CPU with VNNI is faster.
    ``adapter``: the folder of a LoRA or DoRA of `peft`, or its name on the hub; several in a list, or as a dictionary
    with their weights. They are merged as the weights are read.
    ``chat_template``: whether questions are asked in the words of the language model's own chat template, which its
    folder has to hold, and in place of BLIP-2's; a program that is run with limits (`blip2.template`).
    ``max_pixels`` and ``allow_truncated``: which pictures are read, see `image.load_image`.

    Raises CheckpointError if there is no such model or it is incomplete; OptionError for a device or precision that
    cannot be had.
    """
    reading = Reading(max_pixels=max_pixels, allow_truncated=allow_truncated)
    chosen = checkpoint.quantization(quantize, vision=quantize_vision, images=vision)
    where = device if device == "auto" else str(find_device(device))
    folder = checkpoint.resolve(name, revision=revision)
    adapters = Adapters.of(adapter)
    # What is wrong with the small files is told before the large ones are read.
    config = checkpoint.read_config(folder)
    tokenizer, settings = Tokenizer.from_folder(folder), checkpoint.image_settings(folder, config)
    reads_prompt = isinstance(config, Blip2Config) and config.reads_prompt
    instruction_tokenizer = Tokenizer.from_folder(folder / checkpoint.QFORMER_TOKENIZER) if reads_prompt else None
    if chat_template and not isinstance(config, Blip2Config):
        raise OptionError(f"{option('chat_template')} is for models that write; {name} compares, leave it out")
    if chat_template and reads_prompt:
        raise OptionError(
            f"{option('chat_template')} is not for an InstructBLIP such as {name}, whose Q-Former reads the question "
            "itself; leave it out"
        )
    template = ChatTemplate.from_folder(folder, tokenizer.special_names()) if chat_template else None
    plan = placement.plan_for(folder, device=where, dtype=find_dtype(dtype), quantize=chosen)
    model = placement.load(folder, plan, quantize=chosen, adapters=adapters)
    called = str(name) if name is not None else "miniature"
    if isinstance(model, Blip2):
        return Pipeline(
            model, tokenizer, settings,
            name=called, reading=reading, instruction_tokenizer=instruction_tokenizer, template=template,
        )  # fmt: skip
    return Matcher(model, tokenizer, settings, name=called, reading=reading)


def as_pipeline(found: Pipeline | Matcher) -> Pipeline:
    """What `load` gave, if it writes; else CheckpointError."""
    if not isinstance(found, Pipeline):
        raise CheckpointError(
            f"{found.name} is a matching model: it compares images with texts and has no language model to answer "
            "with; name a generative one here, such as Salesforce/blip2-opt-2.7b, or none for the bundled miniature"
        )
    return found


def as_matcher(found: Pipeline | Matcher) -> Matcher:
    """What `load` gave, if it compares; else CheckpointError."""
    if not isinstance(found, Matcher):
        raise CheckpointError(
            f"{found.name} writes about images and does not compare them with texts; name a matching model here, such "
            "as Salesforce/blip2-itm-vit-g, or none for the bundled miniature-itm"
        )
    return found


def find_device(device: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. OptionError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].partition("Expected one of")[0].rstrip(".") or "there is no such kind"
        if reason.startswith("Could not run"):  # pages about operators
            reason = "this torch is not built for it"
        raise OptionError(
            f"{option('device')} {device!r} cannot be used ({reason}); use auto, cpu, cuda or cuda:N"
        ) from None
    return found


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A precision by its name; OptionError for another name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise OptionError(f"{option('dtype')} {dtype!r} is not a precision for this model; use {', '.join(DTYPES)}")
    return DTYPES[dtype]
