"""What ``from_pretrained`` is told, in this package's words: the model's place, device, precision, quantisation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from blip2 import checkpoint, placement
from blip2.api import find_device, find_dtype
from blip2.checkpoint.settings import read_json
from blip2.errors import OptionError
from blip2.model import Blip2, Blip2Matcher

Device = str | int | torch.device

# What changes nothing here: weights are always streamed from safetensors, no code comes with them, and there is one
# way to make pixels.
WITHOUT_EFFECT = ("low_cpu_mem_usage", "trust_remote_code", "use_fast", "use_safetensors")
PLACE = ("revision", "local_files_only")
MODEL = ("dtype", "torch_dtype", "device_map", "load_in_8bit", "load_in_4bit", "quantization_config")


def check_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for an argument that does not exist, with those that do."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{where} has no argument {name!r}; it takes {', '.join(known)}")


def find_folder(name: str | Path, options: Mapping[str, Any], known: Iterable[str] = ()) -> Path:
    """The folder of a model by its path or name. Raises CheckpointError where there is none."""
    check_names("from_pretrained", options, (*known, *PLACE, *WITHOUT_EFFECT))
    return checkpoint.resolve(
        name, revision=options.get("revision"), local_files_only=options.get("local_files_only", False)
    )


def load_model(name: str | Path, options: Mapping[str, Any]) -> tuple[Blip2 | Blip2Matcher, Path]:
    """The model that ``from_pretrained(name, **options)`` asks for, and the folder that it came from.

    - ``dtype`` (or ``torch_dtype``): a torch.dtype, its name, or "auto": what config.json says. None: what suits a CPU
      (bfloat16 for a large model where it computes in that, else float32); on a GPU "auto". A CPU does not compute in
      float16: there it gives bfloat16, and a warning.
    - ``device_map``: None is the CPU, "auto" the GPU if there is one, with what does not fit on the CPU, else a device
      or ``{"": device}``.
    - ``load_in_8bit``, ``load_in_4bit``, or a ``quantization_config`` that says so.
    - ``revision``, ``local_files_only``.

    The Q-Former stays in float32 throughout, and a T5 in float16 is computed in bfloat16 (see `checkpoint.load`).
    Raises TypeError for another argument, OptionError for what cannot be had, CheckpointError for the files.
    """
    folder = find_folder(name, options, MODEL)
    device = _device(options.get("device_map"))
    quantize = _quantize(options)
    dtype = _dtype(options, folder, device, quantize)
    where = "auto" if options.get("device_map") == "auto" else str(device)
    chosen = checkpoint.quantization(quantize)
    plan = placement.plan_for(folder, device=where, dtype=dtype, quantize=chosen)
    return placement.load(folder, plan, quantize=chosen), folder


def named_device(device: Device) -> torch.device:
    """A device by its name, or a GPU by its number; OptionError if it is not there."""
    return find_device(f"cuda:{device}" if isinstance(device, int) else str(device))


def device_and_dtype(
    device: Device | torch.dtype | None, dtype: torch.dtype | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """What ``.to(device, dtype)`` asks for, where a precision may also stand alone in the first place."""
    if isinstance(device, torch.dtype):
        return None, device
    return (None if device is None else named_device(device)), dtype


def _device(device_map: Device | Mapping[str, Device] | None) -> torch.device:
    """Where the model goes; the whole of it to one device."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise OptionError(
                f"device_map is {dict(device_map)}, which divides the model; it goes to one device here: "
                'give "auto", a device such as "cuda:0", or {"": "cuda:0"}'
            )
        return named_device(device_map[""])
    return named_device(device_map)


def _quantize(options: Mapping[str, Any]) -> str | None:
    """The loader's word for the flags, or for a ``quantization_config``, which may be a dictionary or any object."""
    config = options.get("quantization_config") or {}
    asked = set()
    for flag, kind in (("load_in_8bit", "int8"), ("load_in_4bit", "int4")):
        in_config = config.get(flag) if isinstance(config, Mapping) else getattr(config, flag, False)
        if options.get(flag) or in_config:
            asked.add(kind)
    if len(asked) > 1:
        raise OptionError("both load_in_8bit and load_in_4bit are set; choose one")
    if config and not asked:
        raise OptionError(
            f"quantization_config is {config}, which asks for neither load_in_8bit nor load_in_4bit; set one of them"
        )
    return asked.pop() if asked else None


def _dtype(options: Mapping[str, Any], folder: Path, device: torch.device, quantize: str | None) -> torch.dtype | None:
    """The precision to load in; None leaves it to the loader."""
    asked = options.get("dtype")
    if asked is None:
        asked = options.get("torch_dtype")
    if asked is None:
        if device.type == "cpu" or quantize is not None:
            return None
        asked = "auto"
    if asked == "auto":
        config = read_json(folder / "config.json")
        asked = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = find_dtype(asked)
    if dtype == torch.float16 and device.type == "cpu":
        warnings.warn(
            "float16 is not computed on a CPU: the model is loaded in bfloat16, and stays so wherever it is moved; "
            'for float16 load it onto the GPU at once, with device_map="auto"',
            stacklevel=4,
        )
        return torch.bfloat16
    return dtype
