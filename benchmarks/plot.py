"""The chart of docs/benchmarks.md, from what published.py measured.

    python benchmarks/plot.py [RESULTS.json ...] [--out docs/benchmarks.svg]

Without results: docs/benchmarks/x*l.json. For each checkpoint a row of three charts: ms per token (with a line at what
the machine's memory speed allows for that precision), captions per second, and the most memory that was resident.
Writes plain SVG, and prints its path.
"""

from __future__ import annotations

import argparse
import json
import statistics
from html import escape
from pathlib import Path
from typing import Any

from published import kept

DOCS = Path(__file__).parents[1] / "docs"
CHARTS = (  # name of the samples, title, how many of the unit in one
    ("token_s", "ms per token, one row (lower is better)", 1e3),
    ("captions_a_s", "images/s, 16 captions at once (higher is better)", 1.0),
    ("peak_bytes", "GB resident at most (lower is better)", 1e-9),
)
WIDTH, LABEL, BAR, GAP, CHART = 300, 150, 18, 8, 470
COLOURS = {"transformers": "#9a9a9a", "ours": "#2f6fb0", "limit": "#c0392b"}


def text(x: float, y: float, words: str, *, bold: bool = False, end: bool = False) -> str:
    style = (' font-weight="bold"' if bold else "") + (' text-anchor="end"' if end else "")
    return f'<text x="{x:.0f}" y="{y:.0f}"{style}>{escape(words)}</text>'


def chart(left: float, top: float, found: dict[str, Any], name: str, title: str, scale: float) -> list[str]:
    """Bars, one a side, each with its figure; where memory bounds the speed, the bound as a red line."""
    sides = {side: samples for side, samples in found["sides"].items() if kept(samples, name)[0]}
    parts = [text(left, top, title, bold=True)]
    if not sides:
        return []
    values = {side: statistics.median(kept(samples, name)[0]) * scale for side, samples in sides.items()}
    room = (WIDTH - 60) / max(values.values())
    for row, (side, value) in enumerate(values.items()):
        y = top + 12 + row * (BAR + GAP)
        colour = COLOURS["transformers" if side.startswith("transformers") else "ours"]
        parts.append(text(left + LABEL - 8, y + BAR - 5, side, end=True))
        parts.append(f'<rect x="{left + LABEL}" y="{y}" width="{value * room:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(text(left + LABEL + value * room + 5, y + BAR - 5, f"{value:.3g}"))
        if name == "token_s":
            least = sides[side]["bytes_a_token"][0] / statistics.median(found["limits"]["memory"]) * scale
            x = left + LABEL + least * room
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + BAR + 2}"'
            parts.append(f'<line {line} stroke="{COLOURS["limit"]}" stroke-width="2"/>')
    return parts


def draw(results: list[dict[str, Any]]) -> str:
    parts: list[str] = []
    top = 20.0
    for found in results:
        parts.append(text(10, top, f"{found['name']}, {found['threads']} threads", bold=True))
        for column, (name, title, scale) in enumerate(CHARTS):
            parts += chart(10 + column * CHART, top + 24, found, name, title, scale)
        top += 24 + 24 + len(found["sides"]) * (BAR + GAP) + 20
    parts.append(text(10, top, "Red: what reading the weights once at the machine's memory speed would take."))
    size = f'width="{len(CHARTS) * CHART}" height="{top + 14:.0f}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    body = "\n".join(parts)
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{background}\n{body}\n</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=DOCS / "benchmarks.svg")
    args = parser.parse_args()
    paths = args.results or sorted((DOCS / "benchmarks").glob("x*l.json"))
    if not paths:
        print(f"nothing to draw: write results to {DOCS / 'benchmarks'} with published.py --json")
        return
    args.out.write_text(draw([json.loads(path.read_text(encoding="utf-8")) for path in paths]), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
