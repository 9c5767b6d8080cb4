"""The arguments of ``from_pretrained``: device, dtype and quantisation of the model."""

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

# No effect here: weights are always streamed, no remote code is run, there is one way of preprocessing, and nothing is
# offloaded to disk. A weight of the wrong shape is always an error that names it.
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
    "variant": "variants of files are not supported; for another precision give dtype",
    "proxies": "set the environment variable HTTPS_PROXY",
    "gguf_file": "weights are read from safetensors",
    "from_tf": "weights are read from safetensors",
    "from_flax": "weights are read from safetensors",
    "tp_plan": 'the model is on one device, or split with device_map="auto"',
    "device_mesh": 'the model is on one device, or split with device_map="auto"',
    "key_mapping": "weights need the published names",
}
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DIVIDED = ("auto", "balanced", "balanced_low_0", "sequential")


def check_names(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for an unknown argument, with the known ones."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{where} has no argument {name!r}; it takes {', '.join(known)}")


def find_folder(name: str | Path, options: Mapping[str, Any], known: Iterable[str] = ()) -> Path:
    """The folder of a model by its path or name. Raises CheckpointError if there is none.

    For a repository on the hub: ``revision``, ``local_files_only``, ``cache_dir`` (instead of the default cache),
    ``token`` (or ``use_auth_token``), ``force_download``. For these and folders: ``subfolder``.
    """
    check_names("from_pretrained", options, (*known, *PLACE, *WITHOUT_EFFECT, *REFUSED))
    for refused, reason in REFUSED.items():
        if options.get(refused) not in (None, False):
            raise OptionError(f"{refused} is {options[refused]!r}, which is not supported: {reason}")
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
    """The model for ``from_pretrained(name, **options)``, and its folder.

    - ``dtype`` (or ``torch_dtype``): a torch.dtype, its name, or "auto": that of config.json. None: what suits a CPU
      (bfloat16 for a large model if the CPU computes in it, else float32); on a GPU "auto". A CPU cannot compute in
      float16: there it means bfloat16, with a warning.
    - ``device_map``: None is the CPU; "auto" ("balanced", "sequential") the GPU if there is one, with the rest on the
      CPU; else a device, or a dictionary with a single device.
    - ``max_memory``: bytes, or "10GB", by device; for a GPU, the part of its memory to use.
    - ``load_in_8bit``, ``load_in_4bit``, or a ``quantization_config`` with them.
    - ``adapter``: a LoRA or DoRA in the format of `peft` (folder or hub name), several, or each with its weight;
      merged as the weights are read, before quantisation.
    - the location of the files: see `find_folder`. If a folder only has .bin files, these are read.

    The Q-Former always stays in float32, and a T5 in float16 is computed in bfloat16 (see `checkpoint.load`). Raises
    TypeError for an unknown argument, OptionError for an impossible one, CheckpointError for the files.
    """
    folder = find_folder(name, options, MODEL)
    check_transformer(checkpoint.read_config(folder), folder)
    attention = options.get("attn_implementation")
    if attention is not None and attention not in ATTENTION:
        raise OptionError(f"attn_implementation is {attention!r}; use {', '.join(ATTENTION)}")
    device = _device(options.get("device_map"))
    quantize = _quantize(options)
    dtype = _dtype(options, folder, device, quantize)
    where = "auto" if options.get("device_map") in DIVIDED else str(device)
    chosen = checkpoint.quantization(quantize)
    limits = _limits(options.get("max_memory"))
    free_memory = {"free_bytes": _free_bytes(limits)} if limits and where == "auto" and device.type == "cuda" else {}
    plan = placement.plan_for(folder, device=where, dtype=dtype, quantize=chosen, **free_memory)
    for place, limit in limits.items():
        if (needed := plan.num_bytes(place)) > limit:
            raise OptionError(
                f"max_memory is {limit / 1e9:.2f} GB for {place}, but the model needs {needed / 1e9:.2f} GB; raise "
                "it, or use a smaller model (load_in_8bit=True, load_in_4bit=True)"
            )
    adapters = Adapters.of(options.get("adapter"))
    model = placement.load(folder, plan, quantize=chosen, pickles=True, prepare=unfuse, adapters=adapters)
    return model, folder


def _limits(max_memory: Mapping[Any, Any] | None) -> dict[str, int]:
    """Bytes by device name."""
    return {
        f"cuda:{device}" if isinstance(device, int) else str(device): size_bytes(size)
        for device, size in (max_memory or {}).items()
    }


def _free_bytes(limits: Mapping[str, int]) -> int:
    """The free memory of a GPU to assume, so that the weights on it stay within the limit."""
    gpu = torch.cuda.current_device()
    free: int = torch.cuda.mem_get_info()[0]
    limit = limits.get(f"cuda:{gpu}")
    if limit is None:
        return free
    return min(free, int((limit + placement.RESERVED_BYTES) / (1 - placement.RESERVED_SHARE)))


def size_bytes(size: int | str) -> int:
    """5000, "5GB" or "5GiB" in bytes. OptionError for an invalid size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(size).upper())
    if not found:
        raise OptionError(f'size is {size!r}; give it as "5GB", or as a number of bytes')
    return int(float(found[1]) * UNITS[found[2] or ""])


def named_device(device: Device) -> torch.device:
    """A device by its name, or a GPU by its number; OptionError if it does not exist."""
    return find_device(f"cuda:{device}" if isinstance(device, int) else str(device))


def device_and_dtype(
    device: Device | torch.dtype | None, dtype: torch.dtype | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """The arguments of ``.to(device, dtype)``; a dtype may also be the first argument."""
    if isinstance(device, torch.dtype):
        return None, device
    return (None if device is None else named_device(device)), dtype


def _device(device_map: Device | Mapping[str, Device] | None) -> torch.device:
    """The device of the model; the whole model goes to one device."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        if len({str(device) for device in device_map.values()}) != 1:
            raise OptionError(
                f"device_map is {dict(device_map)}, which splits the model; only one device is supported: "
                'give "auto", a device such as "cuda:0", or {"": "cuda:0"}'
            )
        return named_device(next(iter(device_map.values())))
    return named_device("auto" if device_map in DIVIDED else device_map)


def _quantize(options: Mapping[str, Any]) -> str | None:
    """The quantisation from the flags, or from a ``quantization_config``, which may be a dictionary or any object."""
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
            f"quantization_config is {config}, without load_in_8bit or load_in_4bit; set one of them"
        )
    return asked.pop() if asked else None


def _dtype(options: Mapping[str, Any], folder: Path, device: torch.device, quantize: str | None) -> torch.dtype | None:
    """The dtype to load in; None leaves it to the loader."""
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
            "float16 is not supported on a CPU: the model is loaded in bfloat16, and keeps it wherever it is moved; "
            'for float16 load it directly onto the GPU, with device_map="auto"',
            stacklevel=4,
        )
        return torch.bfloat16
    return dtype
