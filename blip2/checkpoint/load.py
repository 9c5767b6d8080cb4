"""Load a model: built without memory, then filled one tensor at a time.

A tensor is read from the memory-mapped file, checked, cast, put on its device, and forgotten before the next, so
that the peak is the finished model and one tensor. Strict: what is missing, unexpected or misshapen is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blip2.checkpoint.keys import ALIASES, IGNORED, table
from blip2.checkpoint.settings import read_config, read_json
from blip2.config import Blip2Config, MatcherConfig
from blip2.errors import CheckpointError, OptionError
from blip2.model import Blip2, Blip2Matcher

WEIGHTS = "model.safetensors"


def load(folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Blip2 | Blip2Matcher:
    """The model in a folder of the published layout, in evaluation mode, generative or matching.

    ``dtype`` is meant for the image encoder and the language model (see `part_dtypes`); by default fp32 on a CPU,
    half precision on a GPU. Raises `CheckpointError` that names the file and the key.
    """
    config = read_config(folder)
    device = torch.device(device)
    dtypes = part_dtypes(config, device, dtype)
    with torch.device("meta"), _Uninitialised():
        model: Blip2 | Blip2Matcher = Blip2(config) if isinstance(config, Blip2Config) else Blip2Matcher(config)
    parameters = dict(model.named_parameters())
    names = table(config)
    assert names.keys() == parameters.keys(), names.keys() ^ parameters.keys()
    with ExitStack() as stack:
        tensors = _open(folder, stack)
        sources = _sources(names, tensors, folder, config)
        for ours, theirs in sources.items():
            wanted = parameters[ours]
            tensor = tensors[theirs].get_tensor(theirs)
            if tensor.shape != wanted.shape:
                raise CheckpointError(
                    f"{folder}: {theirs} is {list(tensor.shape)}, config.json asks for {list(wanted.shape)}; "
                    "the weights belong to another configuration"
                )
            _place(model, ours, tensor.to(device, dtypes[ours.split(".")[0]]))
    return model.eval()


class _Uninitialised(TorchFunctionMode):
    """Nothing is initialised that is going to be loaded; on the meta device that would import half of a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def part_dtypes(config: Blip2Config | MatcherConfig, device: torch.device, dtype: torch.dtype | None) -> dict:
    """The precision of each part (by the first word of its parameters' names), as a written policy.

    - CPU: fp32 unless bf16 is asked for; fp16 is refused, no CPU computes in it.
    - GPU: fp16 unless asked otherwise.
    - The Q-Former, its queries and its heads stay in fp32: they are small, and 1e-12 in a norm needs it.
    - T5 never runs in plain fp16, in which its feed-forward layers overflow: bf16 in its place.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise OptionError(f"dtype {dtype} is not a precision for this model; use float32, bfloat16 or float16")
    if dtype == torch.float16 and device.type == "cpu":
        raise OptionError("float16 is not for the CPU; use bfloat16 or float32")
    parts = dict.fromkeys(
        ("qformer", "projection", "vision_projection", "text_projection", "itm_head", "temperature", "lm_head"),
        torch.float32,
    )
    parts["vision"] = parts["language"] = dtype
    if isinstance(config, Blip2Config) and config.language.family == "t5" and dtype == torch.float16:
        parts["language"] = torch.bfloat16
    return parts


def _open(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Every tensor's name and the open file that holds it; one file or several with an index."""
    index = folder / f"{WEIGHTS}.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [WEIGHTS]
    tensors: dict[str, safe_open] = {}
    for name in files:
        path = folder / name
        if not path.exists():
            hint = " (pickled .bin weights are not read; convert them to safetensors)" if _has_pickle(folder) else ""
            raise CheckpointError(f"{folder}: {name} is missing{hint}; fetch the model again")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: is damaged or cut short ({error}); fetch the file again") from None
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _sources(
    names: dict[str, str], found: Iterable[str], folder: Path, config: Blip2Config | MatcherConfig
) -> dict[str, str]:
    """Our names to names in the file, every one of them accounted for."""
    unused = set(found) - set(IGNORED)
    sources, missing = {}, []
    for ours, theirs in names.items():
        aliases = (theirs, *ALIASES.get(theirs, ()))
        present = [name for name in aliases if name in unused]
        unused.difference_update(present)
        if present:
            sources[ours] = present[0]
        else:
            missing.append(theirs)
    if missing == ["language_model.lm_head.weight"] and _is_tied(folder):
        sources["language.output.weight"] = sources["language.token_embedding.weight"]
        missing = []
    for what, keys in (("missing", missing), ("unexpected", sorted(unused))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{folder}: {keys[0]}{more} {'is' if len(keys) == 1 else 'are'} {what}; "
                "the weights and config.json do not belong together"
            )
    return sources


def _is_tied(folder: Path) -> bool:
    return bool(read_json(folder / "config.json").get("text_config", {}).get("tie_word_embeddings"))


def _has_pickle(folder: Path) -> bool:
    return any(folder.glob("*.bin"))


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a loaded tensor where the empty parameter was."""
    *path, last = name.split(".")
    module = model.get_submodule(".".join(path))
    setattr(module, last, nn.Parameter(tensor))


def named_tensors(model: Blip2 | Blip2Matcher) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its published name, in the table's order."""
    parameters = dict(model.named_parameters())
    for ours, theirs in table(model.config).items():
        yield theirs, parameters[ours].detach()
