"""A model's weights by their names in files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from blip2.checkpoint.keys import Config, is_transposed, published_names, rows_of_parts, table
from blip2.checkpoint.quantize import CODES, SCALES, Quantization, quantization_of
from blip2.linear import readable
from blip2.model import Blip2, Blip2Matcher
from blip2.quantized import QuantizedLinear


def names_in_files(model: nn.Module, config: Config, stored: Quantization | None) -> dict[str, str]:
    """Our names to names in files, with codes and scales for quantised weights."""
    names: dict[str, str] = {}
    for ours, theirs in in_parts(model, table(config)).items():
        name, _, last = ours.rpartition(".")
        is_quantized = stored is not None and stored.bits_of(name) is not None
        if is_quantized and last == "weight" and isinstance(model.get_submodule(name), QuantizedLinear):
            stem = ours.removesuffix("weight")
            names |= {f"{stem}{CODES}": f"{theirs}.{CODES}", f"{stem}{SCALES}": f"{theirs}.{SCALES}"}
        else:
            names[ours] = theirs
    return names


def in_parts(model: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """A layer that is several in the files, and is split in the model too, has an entry for each part."""
    rows: dict[str, str] = {}
    for ours, theirs in names.items():
        module, _, last = ours.rpartition(".")
        parts = published_names(theirs)
        if len(parts) > 1 and any(True for _ in model.get_submodule(module).children()):
            rows |= {f"{module}.{part.split('.')[-2]}.{last}": part for part in parts}
        else:
            rows[ours] = theirs
    return rows


def named_tensors(model: Blip2 | Blip2Matcher) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in files, in the table's order; concatenated tensors are split."""
    for ours, theirs in names_in_files(model, model.config, quantization_of(model)).items():
        module_name, _, last = ours.rpartition(".")
        tensor = readable(getattr(model.get_submodule(module_name), last))
        if last in (CODES, SCALES):
            yield theirs, tensor
            continue
        names = published_names(theirs)
        if is_transposed(model.config, ours):
            tensor = tensor.T
        is_one = len(names) == 1
        parts = [tensor] if is_one else tensor.split(rows_of_parts(model.config, ours, len(tensor), len(names)))
        yield from zip(names, parts, strict=True)
