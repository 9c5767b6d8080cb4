"""``blip2 models``: list the published models."""

from __future__ import annotations

import json
from typing import Any

import click

from blip2.cli.options import in_words, labelled, printing, with_options

KINDS = ("bfloat16", "int8", "int4")
COLUMNS: tuple[tuple[str, int, Any], ...] = (
    ("", 31, "left"), ("size", 6, "right"), ("fetch", 5, "right"), ("bf16", 4, "right"), ("int8", 4, "right"),
    ("int4", 4, "right"), ("px", 3, "right"), ("commit", 7, "left"), ("here", 4, "left"),
)  # fmt: skip
"""Heading, width in characters and alignment of each column: 80 characters in all, the same in every table."""


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with all details.")
@with_options()
def command(as_json: bool) -> None:
    """List the published models: purpose, size and memory.

    Memory is that of the weights on a CPU, with image encoder and language model in bfloat16, or with --quantize int8
    or int4; images and texts need some more. The families of parts that blip2 assemble can combine are listed below, by
    the model_type in config.json.

    \b
    blip2 models
    blip2 pull Salesforce/blip2-opt-2.7b
    """
    rows = known_models()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        _show(rows)


def known_models() -> list[dict[str, Any]]:
    """Each published model as plain values: sizes in bytes, image size in pixels, commits and folders by name."""
    import torch

    from blip2.checkpoint import quantization
    from blip2.checkpoint.describe import describe, find
    from blip2.published import PUBLISHED

    rows = []
    for name, model in PUBLISHED.items():
        needs = {
            kind: describe(
                model.config, dtype=torch.bfloat16, quantization=quantization(kind if kind.startswith("int") else None)
            )
            for kind in KINDS
        }
        folder = find(name)
        rows.append(
            {
                "name": name,
                "purpose": model.purpose,
                "parameters": needs["bfloat16"].num_parameters,
                "download_bytes": round(model.size_gb * 1e9),
                "memory_bytes": {
                    kind: each.num_bytes for kind, each in needs.items() if each.quantized or kind == KINDS[0]
                },
                "image_size_px": model.config.vision.image_size,
                "licence": model.licence,
                "revision": model.revision,
                "folder": None if folder is None else str(folder),
            }
        )
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from blip2.checkpoint.parts import ENCODERS, STARTS
    from blip2.checkpoint.settings import LANGUAGES

    parts = {"Language model": LANGUAGES, "Image encoder": ENCODERS, "Q-Former from": (*STARTS, "blip-2", "scratch")}

    with printing() as out:
        for purpose in dict.fromkeys(row["purpose"] for row in rows):
            table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
            for heading, width, justify in COLUMNS:
                table.add_column(heading, justify=justify, no_wrap=True, min_width=width)
            for row in rows:
                if row["purpose"] == purpose:
                    table.add_row(*_cells(row))
            out.print(f"{purpose[0].upper()}{purpose[1:]}", style="bold")
            out.print(table)
            out.print()
        out.print("Download in GB; memory of the weights in GB in bfloat16, int8 and int4; image size in pixels.")
        out.print()
        out.print("Parts that can be combined (blip2 assemble, blip2 info)", style="bold")
        for title, families in parts.items():
            out.print(labelled(title, ", ".join(families)))
        out.print()
        for licence in dict.fromkeys(row["licence"] for row in rows):
            names = (row["name"].rpartition("/")[2] for row in rows if row["licence"] == licence)
            out.print(f"Licence of {', '.join(names)}:")
            out.print(f"  {licence}")


def _cells(row: dict[str, Any]) -> list[str]:
    memory = row["memory_bytes"]
    return [
        row["name"],
        in_words(row["parameters"]),
        f"{row['download_bytes'] / 1e9:.1f}",
        *(f"{memory[kind] / 1e9:.1f}" if kind in memory else "-" for kind in KINDS),
        str(row["image_size_px"]),
        (row["revision"] or "newest")[:7],
        "yes" if row["folder"] else "-",
    ]
