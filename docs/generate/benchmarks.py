"""The figures of docs/benchmarks/*.json as tables, so that a page shows what was measured and nothing else."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from docs.generate.markdown import table

RESULTS = Path(__file__).parents[1] / "benchmarks"
TITLES = {
    "decoders-1.1b": "Decoding beside llama.cpp, 1.1 billion parameters",
    "decoders-8b": "Decoding beside llama.cpp, 8 billion parameters",
    "serve": "The server under load",
    "soak": "The server under load and attack",
    "xl": "Flan-T5-XL beside transformers",
    "xxl": "Flan-T5-XXL in 8 and 4 bits",
}
"""Of the files; another is named as its file is."""
WAYS = {"seen": "three images in turn", "new": "another image each time", "streamed": "three images in turn, streamed"}
LINES = (  # name of the samples in published.py's JSON, title, units in one
    ("token_s", "one token, one image, ms", 1e3),
    ("first_s", "image to first token, s", 1.0),
    ("second_s", "a second question about the same image, s", 1.0),
    ("captions_a_s", "16 captions at once, images/s", 1.0),
    ("peak_bytes", "peak memory, GB", 1e-9),
    ("load_s", "loading, files not in memory, s", 1.0),
    ("start_s", "loading to first token, s", 1.0),
    ("bytes_a_token", "weights read per token, GB", 1e-9),
)


def page() -> str:
    parts = [
        "# Measured figures",
        "Generated from the files in `docs/benchmarks/`, which the programs in `benchmarks/` wrote. How each was "
        "measured, on which machine, and what limits it: [Benchmarks](../benchmarks.md). Medians. A star marks samples "
        "that were taken while other processes used more than 5 % of the processors.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        parts += [f"## {TITLES.get(path.stem, path.stem)}", told(content)]
        parts.append(f"The samples: [docs/benchmarks/{path.name}](../benchmarks/{path.name}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def told(content: Any) -> str:
    """The tables of one file, by its layout; of one that is not known only its download is offered."""
    if not isinstance(content, dict):
        return ""
    if "sides" in content and "limits" in content:
        return _published(content)
    if "s" in content and "bytes_a_token" in content:
        return _decoders(content)
    if isinstance(content.get("rows"), list) and "requests_per_s" in content["rows"][0]:
        return _server(content)
    if "attacks" in content:
        return _soak(content)
    return ""


def _figure(samples: dict[str, list[float]], name: str, scale: float) -> str:
    star = "" if samples.get(name) else " *"
    values = samples.get(name) or samples.get(f"{name} disturbed")
    return f"{shown(statistics.median(values) * scale)}{star}".replace("*", "\\*") if values else "-"


def shown(number: float) -> str:
    """Three digits: 0.0123, 1.23, 123, 1,230."""
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 100 else f"{number:.3g}"


def _published(content: dict[str, Any]) -> str:
    sides = content["sides"]
    rows = [[title, *(_figure(sides[side], name, scale) for side in sides)] for name, title, scale in LINES]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return f"`{content['command']}`\n\n{table([content['name'], *sides], rows)}"


def _decoders(content: dict[str, Any]) -> str:
    """Of benchmarks/decoders.py: seconds a token, and of prompts."""
    sides = content["s"]
    lines = list(dict.fromkeys(line for samples in sides.values() for line in samples))
    rows = [
        [f"{line} tokens, ms" if line.startswith("prompt") else f"{line.split()[0]} after {line.split()[1]}, ms",
         *(_figure(sides[side], line, 1e3) for side in sides)]
        for line in lines
    ]  # fmt: skip
    rows.append(["weights read per token, GB", *(f"{content['bytes_a_token'][side] / 1e9:.2f}" for side in sides)])
    size = content["shape"].replace("b", " billion")
    told_of = f"A language model with the shape of a Llama of {size} parameters, {content['threads']} threads."
    return f"{told_of}\n\n{table(['', *sides], rows)}"


def _server(content: dict[str, Any]) -> str:
    """Of benchmarks/serve.py: a table for each model, server and way."""
    head = ["clients", "requests/s", "first token p50, s", "first token p99, s", "answer p50, s", "answer p99, s"]
    names = ("requests_per_s", "first_token_s_p50", "first_token_s_p99", "answer_s_p50", "answer_s_p99")
    parts = []
    for key in dict.fromkeys((row["model"], row["server"], row["way"]) for row in content["rows"]):
        rows = [
            [str(row["clients"]), *(shown(row[name]) if row.get(name) is not None else "-" for name in names)]
            for row in content["rows"]
            if (row["model"], row["server"], row["way"]) == key
        ]
        parts.append(f"{key[0]}, {key[1]}, {WAYS.get(key[2], key[2])}:\n\n{table(head, rows, right=0)}")
    return "\n\n".join(parts)


def _soak(content: dict[str, Any]) -> str:
    rows = [
        [kind, f"{sum(counts.values()):,}", ", ".join(f"{name}: {count:,}" for name, count in counts.items())]
        for kind, counts in content["requests"].items()
    ]
    attacks = sum(sum(counts.values()) for counts in content["attacks"].values())
    told_of = (
        f"{content['minutes']:.0f} minutes, {content['replicas']} replicas, {content['cores']} cores; beside these "
        f"requests, {attacks:,} malformed or hostile ones of {len(content['attacks'])} kinds."
    )
    return f"{told_of}\n\n{table(['request', 'number', 'outcome'], rows)}"
