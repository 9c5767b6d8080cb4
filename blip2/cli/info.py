"""``blip2 info``: a model's parts, and what it would need here. Reads no weights and downloads no model."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from blip2.cli.options import (
    ADAPTER,
    LABEL_WIDTH,
    PRECISION,
    REVISION,
    adapters_in,
    in_bytes,
    in_words,
    labelled,
    printing,
    with_options,
)
from blip2.cli.part import show_part
from blip2.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from blip2.checkpoint.adapters import Adapter
    from blip2.checkpoint.describe import Description, Stored
    from blip2.config import Blip2Config, MatcherConfig
    from blip2.placement import Plan
    from blip2.published import Published

TITLES = {"vision": "Image encoder", "qformer": "Q-Former", "language": "Language model"}
PARTS = {"vision_model": "image encoder", "language_model": "language model"}
"""By prefix of the published tensor name; all others belong to the Q-Former."""
PURPOSES = {"generative": "captions, questions and chat", "matching": "image-text matching and search"}


class Facts(NamedTuple):
    """Everything reported about a model. ``folder`` and ``files`` are None if the model is not downloaded."""

    name: str
    config: Blip2Config | MatcherConfig
    published: Published | None
    folder: Path | None
    files: Stored | None
    device: torch.device
    model: Description
    alternatives: dict[str, int]
    """Memory in bytes with each choice of --quantize."""
    adapters: list[Adapter]


@click.command("info")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every layer.")
@click.option("--plan", "with_plan", is_flag=True, help="Show which part would be placed on the GPU or the CPU.")
@click.option("--gpu-memory", type=float, metavar="GB", help="With --plan: free GPU memory to assume.")
@with_options((REVISION,), PRECISION, (ADAPTER,))
def command(model: str | None, as_json: bool, with_plan: bool, gpu_memory: float | None, **options: Any) -> None:
    """Show a model's parts, precision and memory on this machine.

    MODEL is a folder or a name on the Hugging Face hub; the default is the bundled miniature. Published models need not
    be downloaded first. The report lists the parts, the precision that would be chosen and why, the memory of the
    weights in that precision, and which layers are quantised. For a single part (a language model, an image encoder, a
    BERT) it shows the family and size.

    \b
    blip2 info Salesforce/blip2-flan-t5-xxl --quantize int4
    blip2 info my-model --device cuda --json
    """
    if gpu_memory is not None and not (with_plan and gpu_memory > 0):
        raise click.UsageError("--gpu-memory is a number of GB above 0, and needs --plan")
    if show_part(model, options["revision"], as_json):
        return
    facts = _facts(model, **options)
    plan = _plan(facts, options["dtype"], gpu_memory) if with_plan else None
    if as_json:
        content = _as_json(facts)
        if plan is not None:
            content["plan"] = {"devices": plan.devices, "reason": plan.reason}
        click.echo(json.dumps(content, indent=2))
        return
    with printing() as out:
        for show in (_show_head, _show_architecture, _show_memory, _show_precision, _show_layers):
            show(facts, out)
        for number, line in enumerate(plan.lines() if plan is not None else ()):
            out.print(labelled("" if number else "Plan", line))


def _facts(
    name: str | None,
    *,
    revision: str | None,
    device: str,
    dtype: str,
    quantize: str | None,
    quantize_vision: bool,
    vision: str | None,
    adapter: tuple[str, ...],
) -> Facts:
    from blip2.api import find_dtype
    from blip2.checkpoint import image_settings, quantization, read_config
    from blip2.checkpoint.describe import describe, find, stored
    from blip2.checkpoint.quantize import quantization_in
    from blip2.published import PUBLISHED

    asked = quantization(quantize, vision=quantize_vision, images=vision)
    where, wanted = _device(device), find_dtype(None if dtype == "auto" else dtype)
    folder = find(name, revision)
    published = PUBLISHED.get(name) if name is not None else None
    if folder is not None:
        config, chosen, files = read_config(folder), quantization_in(folder, asked), stored(folder)
        image_settings(folder, config)  # checks that the two match
    else:
        assert published is not None
        config, chosen, files = published.config, asked, None
    model = describe(config, device=where, dtype=wanted, quantization=chosen)
    alternatives = {}
    if chosen is None:
        for kind in ("int8", "int4"):
            other = describe(config, device=where, dtype=wanted, quantization=quantization(kind))
            if other.quantized:
                alternatives[kind] = other.num_bytes
    adapters = _adapters(adapter, name, folder)
    return Facts(name or "miniature", config, published, folder, files, where, model, alternatives, adapters)


def _adapters(names: tuple[str, ...], model: str | None, folder: Path | None) -> list[Adapter]:
    """The adapters to merge. Checks from their files that they fit this model."""
    from blip2.checkpoint.adapters import Adapters
    from blip2.checkpoint.load import fitted_adapters

    if (adapters := Adapters.of(adapters_in(names))) is None:
        return []
    if folder is None:
        raise CheckpointError(f"{model}: is not downloaded, and --adapter needs its files; run blip2 pull {model}")
    return list(fitted_adapters(adapters, folder))


def _plan(facts: Facts, dtype: str, gpu_memory: float | None) -> Plan:
    """The placement on this machine, or on one whose GPU has ``gpu_memory`` GB free."""
    import torch

    from blip2 import placement
    from blip2.api import find_dtype

    free = None if gpu_memory is None else int(gpu_memory * 1e9)
    if free is None and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    where = "auto" if gpu_memory is not None or facts.device.type == "cpu" else str(facts.device)
    wanted = find_dtype(None if dtype == "auto" else dtype)
    quantization = facts.model.quantization
    return placement.plan(facts.config, device=where, dtype=wanted, quantize=quantization, free_bytes=free)


def _device(name: str) -> torch.device:
    """The device of that name. It need not exist here: the memory on another machine may be asked for."""
    import torch

    from blip2.api import find_device

    with suppress(RuntimeError):
        return torch.device(name)
    return find_device(name)  # "auto", or the error


def _as_json(facts: Facts) -> dict[str, Any]:
    model, files = facts.model, facts.files
    return {
        "model": facts.name,
        "folder": None if facts.folder is None else str(facts.folder),
        "kind": _kind(facts),
        "image_size_px": facts.config.vision.image_size,
        "licence": facts.published.licence if facts.published else None,
        "revision": facts.published.revision if facts.published else None,
        "parameters": model.num_parameters,
        "memory_bytes": model.num_bytes,
        "parts": [
            {
                "name": part.name,
                "architecture": part.architecture,
                "parameters": part.num_parameters,
                "memory_bytes": part.num_bytes,
            }
            for part in model.parts
        ],
        "adapters": [
            {"path": str(each.path), "kind": each.kind, "ranks": each.ranks, "weight": each.weight,
             "parameters": each.num_parameters, "changes": sorted(each.changes)}
            for each in facts.adapters
        ],
        "device": str(facts.device),
        "precision": {
            "vision": _name(model.precision.vision),
            "language": _name(model.precision.language),
            "tables": _name(model.precision.tables),
            "reason": model.precision.reason,
        },
        "quantization": model.quantization.as_json() if model.quantized and model.quantization else None,
        "quantized": {name: f"int{bits}" for name, bits in model.quantized.items()},
        "kept": {name: _name(dtype) for name, dtype in model.kept.items()},
        "quantized_memory_bytes": facts.alternatives,
        "disk": files
        and {
            "bytes": files.num_bytes,
            "shared_bytes": files.num_shared_bytes,
            "files": files.num_files,
            "dtypes": [_name(dtype) for dtype in files.dtypes],
        },
    }


def _show_head(facts: Facts, out: Console) -> None:
    kind = _kind(facts)
    purpose = facts.published.purpose if facts.published else PURPOSES[kind]
    out.print(facts.name, style="bold")
    out.print(labelled("For", purpose))
    if facts.folder is not None:
        assert facts.files is not None
        out.print(labelled("Folder", str(facts.folder)))
        files = "1 file" if facts.files.num_files == 1 else f"{facts.files.num_files} files"
        dtypes = ", ".join(_name(dtype) for dtype in facts.files.dtypes)
        out.print(labelled("On disk", f"{in_bytes(facts.files.num_bytes)} in {files}: {dtypes}"))
        if shared := facts.files.num_shared_bytes:
            out.print(labelled("", f"{in_bytes(shared)} of this shared with other models by hard links"))
    elif facts.published is not None:
        size = in_bytes(facts.published.size_gb * 1e9)
        out.print(labelled("Not here", f"{size} to download (blip2 pull); these facts are from the built-in table"))
    if facts.published is not None:
        out.print(labelled("Licence", facts.published.licence))
    out.print()


def _show_architecture(facts: Facts, out: Console) -> None:
    for part in facts.model.parts:
        out.print(labelled(TITLES[part.name], part.architecture))
    for adapter in facts.adapters:
        parts = Counter(PARTS.get(name.partition(".")[0], "Q-Former") for name in adapter.changes)
        changes = ", ".join(f"{number} in the {part}" for part, number in parts.items())
        ranks = f" of rank {', '.join(map(str, adapter.ranks))}" if adapter.ranks else ""
        weight = "" if adapter.weight == 1 else f", with weight {adapter.weight:g}"
        out.print(labelled("Adapter", f"{adapter.path}: {adapter.kind}{ranks}{weight}"))
        out.print(labelled("", f"changes {changes}; {in_words(adapter.num_parameters)} parameters"))
    out.print()


def _show_memory(facts: Facts, out: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"On {facts.device}", min_width=LABEL_WIDTH - 2)
    for heading in ("parameters", "memory"):
        table.add_column(heading, justify="right", min_width=10)
    table.add_column("weights in")
    for part in facts.model.parts:
        table.add_row(
            TITLES[part.name], in_words(part.num_parameters), in_bytes(part.num_bytes), _formats(facts.model, part.name)
        )
    table.add_row("Together", in_words(facts.model.num_parameters), in_bytes(facts.model.num_bytes), style="bold")
    out.print(table)
    if facts.alternatives:
        others = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in facts.alternatives.items())
        out.print(labelled("--quantize", others))
    out.print()


def _show_precision(facts: Facts, out: Console) -> None:
    out.print(labelled("Precision", facts.model.precision.reason))


def _show_layers(facts: Facts, out: Console) -> None:
    """The quantised layers by pattern, and the kept ones: for a part without quantised layers, only its name."""
    from rich.table import Table

    from blip2.checkpoint.describe import by_pattern, part_of

    model = facts.model
    if not model.quantized:
        why = (
            "" if model.quantization is None else "; there is no language model (--quantize-vision: the image encoder)"
        )
        out.print(labelled("Quantised", f"nothing{why}"))
        return
    assert model.quantization is not None
    groups = f", groups of {model.quantization.group_size} inputs" if model.quantization.bits == 4 else ""
    images = "; the image encoder in 8 bits, activations as well" if model.quantization.images else ""
    how = f"to {model.quantization.bits} bits{groups}{images}"
    out.print(labelled("Quantised", f"{len(model.quantized)} layers, {how}"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for pattern, count, bits in by_pattern(model.quantized):
        table.add_row(f"  {pattern}", f"{count} layer{'' if count == 1 else 's'}", f"int{bits}")
    out.print(table)
    label = "Kept"
    for (part, dtype), names in _kept(model).items():
        is_whole = not any(part_of(name) == part for name in model.quantized)
        what = "all of it" if is_whole else ", ".join(pattern for pattern, *_ in by_pattern(dict.fromkeys(names)))
        out.print(labelled(label, f"{TITLES[part]} in {_name(dtype)}: {what}"))
        label = ""


def _kept(model: Description) -> dict[tuple[str, torch.dtype], list[str]]:
    """The weights that are not quantised, by part and precision."""
    from blip2.checkpoint.describe import part_of

    groups: dict[tuple[str, torch.dtype], list[str]] = {}
    for name, dtype in model.kept.items():
        groups.setdefault((part_of(name), dtype), []).append(name)
    return groups


def _kind(facts: Facts) -> str:
    from blip2.config import Blip2Config

    return "generative" if isinstance(facts.config, Blip2Config) else "matching"


def _formats(model: Description, part: str) -> str:
    """The formats of a part's weights, the quantised ones first."""
    from blip2.checkpoint.describe import part_of

    bits = sorted({bits for name, bits in model.quantized.items() if part_of(name) == part})
    dtypes = dict.fromkeys(dtype for name, dtype in model.kept.items() if part_of(name) == part)
    return ", ".join([*(f"int{each}" for each in bits), *(_name(dtype) for dtype in dtypes)])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
