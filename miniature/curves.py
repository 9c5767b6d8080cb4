"""Losses of training runs side by side, of the ``log.jsonl`` that each run writes.

    python -m miniature.curves NAME=FOLDER ... --out curves.svg [--steps 50 100 200 400]

A panel for each loss: thin, what was logged in training; thick with dots, on the held-out rows. Writes plain SVG, and
prints a table in Markdown: the held-out values at those steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

LOSSES = {"itc": "contrast (ITC)", "itm": "matching (ITM)", "lm": "captioning or answering (LM)"}
COLOURS = ("#2f6fb0", "#c0392b", "#3a8f4c", "#8e5ab5")
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 220, 46, 34, 64
Points = list[tuple[int, float]]


def read_log(folder: Path) -> tuple[dict[str, Points], dict[str, Points]]:
    """By name, (step, value) of what was logged in training, and of the evaluations."""
    train: dict[str, Points] = {}
    held_out: dict[str, Points] = {}
    for line in (folder / "log.jsonl").read_text("utf-8").splitlines():
        found: dict[str, Any] = json.loads(line)
        into, values = (held_out, found["evaluation"]) if "evaluation" in found else (train, found)
        for name, value in values.items():
            if name != "step":
                into.setdefault(name, []).append((found["step"], value))
    return train, held_out


def panel(left: float, name: str, runs: dict[str, tuple[dict[str, Points], dict[str, Points]]]) -> list[str]:
    lines = [(run, points) for run, both in runs.items() for points in (both[0].get(name, []), both[1].get(name, []))]
    values = [point for _, points in lines for point in points]
    last, lowest, highest = max(step for step, _ in values), min(v for _, v in values), max(v for _, v in values)
    margin = (highest - lowest or 1) * 0.04
    low, size = lowest - margin, highest - lowest + 2 * margin

    def place(step: float, value: float) -> tuple[float, float]:
        return left + step / last * WIDTH, TOP + HEIGHT - (value - low) / size * HEIGHT

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{escape(LOSSES[name])}</text>']
    parts.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(last * share, low + size * share)
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{low + size * share:.2f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{last * share:.0f}</text>')
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
    for number, (run, points) in enumerate(lines):
        colour, is_held_out = COLOURS[list(runs).index(run) % len(COLOURS)], number % 2
        drawn = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        stroke = 'stroke-width="2.5"' if is_held_out else 'stroke-width="1" stroke-opacity="0.55"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" {stroke}/>')
        if is_held_out:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in drawn]
    return parts


def draw(runs: dict[str, tuple[dict[str, Points], dict[str, Points]]]) -> str:
    names = [name for name in LOSSES if any(name in train for train, _ in runs.values())]
    parts: list[str] = []
    for number, name in enumerate(names):
        parts += panel(LEFT + number * (WIDTH + GAP), name, runs)
    below = TOP + HEIGHT + 40
    for number, run in enumerate(runs):
        x = LEFT + number * 180
        parts.append(f'<rect x="{x}" y="{below - 10}" width="18" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 24}" y="{below}">{escape(run)}</text>')
    note = "step; thin: training, thick: held out"
    parts.append(f'<text x="{LEFT + len(runs) * 180}" y="{below}" fill="#666">{note}</text>')
    size = f'width="{max(LEFT + len(names) * (WIDTH + GAP), 700)}" height="{below + 14}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    body = "\n".join(['<rect width="100%" height="100%" fill="#fff"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def table(runs: dict[str, tuple[dict[str, Points], dict[str, Points]]], steps: Sequence[int]) -> str:
    """Markdown: a row for each value of the evaluations, a column for each run and step."""
    head = [f"{run}, step {step}" for step in steps for run in runs]
    lines = [f"| held out | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for name in next(iter(runs.values()))[1]:
        found = [dict(held_out.get(name, [])).get(step) for step in steps for _, held_out in runs.values()]
        lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:.3f}' for value in found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="*", help="of the table; the last evaluation if not given")
    options = parser.parse_args()
    runs = {name: read_log(Path(folder)) for name, folder in (run.split("=", 1) for run in options.runs)}
    options.out.write_text(draw(runs), encoding="utf-8")
    ends = [found["lm"][-1][0] for _, found in runs.values() if "lm" in found]
    print(table(runs, options.steps or [min(ends)]) if ends else "no evaluations")


if __name__ == "__main__":
    main()
