"""Which model fits which machine: memory as it was measured, or else as it is reckoned from the configuration."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from docs.generate.markdown import table

MEASURED = Path(__file__).parents[1] / "benchmarks"
KINDS = ("bfloat16", "int8", "int4")
OVERHEAD = 0.5e9
"""What a process takes beside the weights; what was measured is 0.3 to 0.5 GB above them."""
SYSTEM = 2.0e9
"""What is left to the rest of the machine."""
MACHINES_GB = (8, 12, 16, 24, 32, 64)
CHOSEN = ("blip2-opt-2.7b", "blip2-flan-t5-xl", "blip2-opt-6.7b", "blip2-flan-t5-xxl", "instructblip-vicuna-13b")

INTRODUCTION = """\
Without `--model`, the bundled miniature is used; it only knows drawings. The published models on the Hugging Face hub
know photographs. `blip2 models` prints this list, and `blip2 pull NAME` downloads one.

- **Captions**: `blip2-opt-2.7b`; or `...-coco` for the style of COCO captions.
- **Questions**: `blip2-flan-t5-xl`. In the paper, Flan-T5 answers better than OPT; its licence is free.
- **Instructions** of any kind, longer answers: `instructblip-flan-t5-xl`.
- **Matching and search**: `blip2-itm-vit-g`.
- **The largest model** on a small machine: `blip2-flan-t5-xxl` with `--quantize int4`, within 9 GB."""

REVISIONS = """\
The commit on the hub that is downloaded, unless `--revision` names another one. In November 2024 the repositories
changed their vocabulary and added an image token; checkpoints from before and after are read."""


def peaks() -> dict[str, dict[str, float]]:
    """The most memory that was resident, in bytes, by model and precision, of benchmarks/published.py."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(MEASURED.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        if not (isinstance(content, dict) and "sides" in content and "limits" in content):
            continue
        for side, samples in content["sides"].items():
            values = samples.get("peak_bytes") or samples.get("peak_bytes disturbed")
            if values and side in KINDS:
                found.setdefault(f"blip2-{content['name']}", {})[side] = statistics.median(values)
    return found


def needs(row: dict[str, Any], measured: dict[str, dict[str, float]]) -> dict[str, tuple[float, bool]]:
    """Bytes of memory by precision, and whether that was measured."""
    known = measured.get(row["name"].rpartition("/")[2], {})
    return {
        kind: (known[kind], True) if kind in known else (size + OVERHEAD, False)
        for kind, size in row["memory_bytes"].items()
    }


def page() -> str:
    from blip2.cli.models import known_models

    rows, measured = known_models(), peaks()
    parts = ["# Choose a model", INTRODUCTION, "## Memory", _memory(rows, measured)]
    parts += ["## By machine", _machines(rows, measured), "## Revisions", REVISIONS]
    parts.append("\n".join(f"- `{row['name']}`: {row['revision'] or 'the newest'}" for row in rows))
    parts.append("## Licences")
    for licence in dict.fromkeys(row["licence"] for row in rows):
        names = ", ".join(f"`{row['name']}`" for row in rows if row["licence"] == licence)
        parts.append(f"- {licence}: {names}")
    return "\n\n".join(parts) + "\n"


def _memory(rows: list[dict[str, Any]], measured: dict[str, dict[str, float]]) -> str:
    lines = []
    for row in rows:
        found = needs(row, measured)
        cells = [f"{size / 1e9:.1f}{' (measured)' if is_measured else ''}" for size, is_measured in found.values()]
        cells += ["-"] * (len(KINDS) - len(cells))
        lines.append([f"`{row['name']}`", row["purpose"], f"{row['download_bytes'] / 1e9:.1f}", *cells])
    head = ["model", "for", "download, GB", "bfloat16, GB", "int8, GB", "int4, GB"]
    told = (
        "Memory that the process needs on a CPU, in GB (10^9 bytes). *Measured*: the peak of loading and generating "
        "([benchmarks](../benchmarks.md)). Otherwise reckoned: the weights, which `blip2 info MODEL` computes from the "
        f"configuration, plus {OVERHEAD / 1e9:.1f} GB. On a GPU, the weights take the same; float16 is as large as "
        "bfloat16."
    )
    return f"{told}\n\n{table(head, lines, right=2)}"


def _machines(rows: list[dict[str, Any]], measured: dict[str, dict[str, float]]) -> str:
    by_name = {row["name"].rpartition("/")[2]: needs(row, measured) for row in rows}
    lines = []
    for gigabytes in MACHINES_GB:
        cells = []
        for name in CHOSEN:
            fits = [kind for kind in KINDS if by_name[name][kind][0] + SYSTEM <= gigabytes * 1e9]
            cells.append(f"{fits[0]}" if fits else "-")
        lines.append([f"{gigabytes} GB", *cells])
    told = (
        f"The best precision that fits, with {SYSTEM / 1e9:.0f} GB left for the rest of the machine. "
        "`int8` and `int4` mean `--quantize int8` and `--quantize int4`; a dash means that the model does not fit. "
        "Read the column for a GPU's memory in the same way. Where a GPU holds only a part of a model, "
        "`--device auto` leaves whole layers on the CPU; `blip2 info MODEL --plan` shows which."
    )
    return f"{told}\n\n{table(['memory', *(f'`{name}`' for name in CHOSEN)], lines)}"
