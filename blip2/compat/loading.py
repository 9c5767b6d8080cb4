"""What ``from_pretrained`` is told, in this package's words: the model's place, device, precision, quantisation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from blip2 import checkpoint, placement
from blip2.api import find_device, find_dtype
from blip2.checkpoint import elsewhere
from blip2.checkpoint.adapters import Adapters
from blip2.checkpoint.settings import read_json
from blip2.compat.config import check_transformer
from blip2.compat.names import unfuse
from blip2.errors import OptionError
from blip2.model import Blip2, Blip2Matcher

Device = str | int | torch.device

# What changes nothing here: weights are always streamed, no code comes with them, there is one way to make pixels, and
# nothing is put on the disk again. A weight that does not fit is always an error that names it.
WITHOUT_EFFECT = (
    "low_cpu_mem_usage", "trust_remote_code", "use_fast", "use_safetensors", "weights_only", "resume_download",
    "offload_folder", "offload_state_dict", "offload_buffers", "ignore_mismatched_sizes", "_fast_init", "mirror",
    "code_revision", "_commit_hash", "adapter_kwargs",
)  # fmt: skip
PLACE = ("revision", "local_files_only", "cache_dir", "token", "use_auth_token", "force_download", "subfolder")
MODEL = (
    "dtype", "torch_dtype", "device_map", "max_memory", "load_in_8bit", "load_in_4bit", "quantization_config",
    "attn_implementation", "adapter",
)  # fmt: skip
REFUSED = {
    "variant": "the files have one name each here; for a smaller precision give dtype",
    "proxies": "set the environment variable HTTPS_PROXY",
    "gguf_file": "weights are read from safetensors",
    "from_tf": "weights are read from safetensors",
    "from_flax": "weights are read from safetensors",
    "tp_plan": 'the model is on one device, or divided by device_map="auto"',
    "device_mesh": 'the model is on one device, or divided by device_map="auto"',
    "key_mapping": "the weights have the published names",
}
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DIVIDED = ("auto", "balanced", "balanced_low_0", "sequential")


def check_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for an argument that does not exist, with those that do."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{where} has no argument {name!r}; it takes {', '.join(known)}")


def find_folder(name: str | Path, options: Mapping[str, Any], known: Iterable[str] = ()) -> Path:
    """The folder of a model by its path or name. Raises CheckpointError where there is none.

    For a repository of the hub: ``revision``, ``local_files_only``, ``cache_dir`` (in place of the usual cache),
    ``token`` (or ``use_auth_token``), ``force_download``. For these and folders: ``subfolder``.
    """
    check_names("from_pretrained", options, (*known, *PLACE, *WITHOUT_EFFECT, *REFUSED))
    for refused, reason in REFUSED.items():
        if options.get(refused) not in (None, False):
            raise OptionError(f"{refused} is {options[refused]!r}, which is not heeded: {reason}")
    place = elsewhere.Place(
        options.get("cache_dir"),
        options.get("token") if options.get("token") is not None else options.get("use_auth_token"),
        options.get("subfolder") or "",
        bool(options.get("force_download")),
    )
    where: dict[str, Any] = {
        "revision": options.get("revision"),
        "local_files_only": options.get("local_files_only") or False,
    }
    if Path(name).expanduser().is_dir() or str(name).count("/") != 1 or place.is_usual:
        folder = checkpoint.resolve(name, **where)
        return elsewhere.inside_of(folder, place.subfolder) if place.subfolder else folder
    return elsewhere.fetch(str(name), place, **where)


def load_model(name: str | Path, options: Mapping[str, Any]) -> tuple[Blip2 | Blip2Matcher, Path]:
    """The model that ``from_pretrained(name, **options)`` asks for, and the folder that it came from.

    - ``dtype`` (or ``torch_dtype``): a torch.dtype, its name, or "auto": what config.json says. None: what suits a CPU
      (bfloat16 for a large model where it computes in that, else float32); on a GPU "auto". A CPU does not compute in
      float16: there it gives bfloat16, and a warning.
    - ``device_map``: None is the CPU, "auto" ("balanced", "sequential") the GPU if there is one, with what does not fit
      on the CPU, else a device, or a dictionary that puts everything on one.
    - ``max_memory``: bytes, or "10GB", by device; of a GPU it says how much of it to use.
    - ``load_in_8bit``, ``load_in_4bit``, or a ``quantization_config`` that says so.
    - ``adapter``: a LoRA or DoRA of `peft`, its folder or its name on the hub, several, or each with its weight;
      merged as the weights are read, before they are quantised.
    - where the files are: see `find_folder`. Of a folder with .bin files alone, the tensors in them are read.

    The Q-Former stays in float32 throughout, and a T5 in float16 is computed in bfloat16 (see `checkpoint.load`).
    Raises TypeError for another argument, OptionError for what cannot be had, CheckpointError for the files.
    """
    folder = find_folder(name, options, MODEL)
    check_transformer(checkpoint.read_config(folder), folder)
    attention = options.get("attn_implementation")
    if attention is not None and attention not in ATTENTION:
        raise OptionError(f"attn_implementation is {attention!r}; it may be one of {', '.join(ATTENTION)}")
    device = _device(options.get("device_map"))
    quantize = _quantize(options)
    dtype = _dtype(options, folder, device, quantize)
    where = "auto" if options.get("device_map") in DIVIDED else str(device)
    chosen = checkpoint.quantization(quantize)
    limits = _limits(options.get("max_memory"))
    room = {"free_bytes": _free_bytes(limits)} if limits and where == "auto" and device.type == "cuda" else {}
    plan = placement.plan_for(folder, device=where, dtype=dtype, quantize=chosen, **room)
    for place, limit in limits.items():
        if (needed := plan.num_bytes(place)) > limit:
            raise OptionError(
                f"max_memory is {limit / 1e9:.2f} GB for {place}, where the model takes {needed / 1e9:.2f} GB; raise "
                "it, or take a smaller model (load_in_8bit=True, load_in_4bit=True)"
            )
    adapters = Adapters.of(options.get("adapter"))
    model = placement.load(folder, plan, quantize=chosen, pickles=True, prepare=unfuse, adapters=adapters)
    return model, folder


def _limits(max_memory: Mapping[Any, Any] | None) -> dict[str, int]:
    """Bytes by the name of the device."""
    return {
        f"cuda:{device}" if isinstance(device, int) else str(device): size_bytes(size)
        for device, size in (max_memory or {}).items()
    }


def _free_bytes(limits: Mapping[str, int]) -> int:
    """What a GPU may be said to have free, so that the weights on it keep within the limit."""
    gpu = torch.cuda.current_device()
    free: int = torch.cuda.mem_get_info()[0]
    limit = limits.get(f"cuda:{gpu}")
    if limit is None:
        return free
    return min(free, int((limit + placement.RESERVED_BYTES) / (1 - placement.RESERVED_SHARE)))


def size_bytes(size: int | str) -> int:
    """5000, "5GB" or "5GiB" in bytes. OptionError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(size).upper())
    if not found:
        raise OptionError(f'size is {size!r}; give it as "5GB", or as a number of bytes')
    return int(float(found[1]) * UNITS[found[2] or ""])


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
        if len({str(device) for device in device_map.values()}) != 1:
            raise OptionError(
                f"device_map is {dict(device_map)}, which divides the model; it goes to one device here: "
                'give "auto", a device such as "cuda:0", or {"": "cuda:0"}'
            )
        return named_device(next(iter(device_map.values())))
    return named_device("auto" if device_map in DIVIDED else device_map)


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
