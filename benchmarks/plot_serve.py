"""The chart of docs/benchmarks.md's section on the server, from what serve.py measured.

    python benchmarks/plot_serve.py RESULTS.json [--out docs/server.svg]

For each model two charts over the number of clients, both axes logarithmic: answers per second, and seconds until the
first token and the whole answer (median). Writes plain SVG, and prints its path.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from plot import COLOURS, DOCS, text

WIDTH, HEIGHT, LEFT, TOP = 360, 240, 60, 60
OURS, OBVIOUS = "blip2 serve", "transformers with a lock"
LINES = {  # of each chart: label, whose, the way of asking, which number, its dashes
    "answers per second": (
        ("blip2 serve, pictures seen before", OURS, "seen", "requests_per_s", ""),
        ("blip2 serve, seen before, streamed", OURS, "streamed", "requests_per_s", "5 4"),
        ("blip2 serve, new pictures", OURS, "new", "requests_per_s", "2 2"),
        ("transformers with a lock", OBVIOUS, "new", "requests_per_s", ""),
    ),
    "seconds, median": (
        ("blip2 serve, answer, seen before", OURS, "seen", "answer_s_p50", ""),
        ("blip2 serve, first token, seen before", OURS, "streamed", "first_token_s_p50", "5 4"),
        ("blip2 serve, answer, new pictures", OURS, "new", "answer_s_p50", "2 2"),
        ("transformers with a lock, answer", OBVIOUS, "new", "answer_s_p50", ""),
    ),
}


def ticks(values: list[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around the values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = [step * 10.0**power for power in range(low, high + 1) for step in (1, 2, 5)]
    first = max(tick for tick in every if tick <= min(values) * 1.001)
    last = min(tick for tick in [*every, 10.0 ** (high + 1)] if tick >= max(values) * 0.999)
    return [tick for tick in every if first <= tick <= last]


def chart(left: float, top: float, rows: list[dict[str, Any]], title: str) -> list[str]:
    curves = []
    for label, server, way, name, dashes in LINES[title]:
        points = [(row["clients"], row[name]) for row in rows if (row["server"], row["way"]) == (server, way)]
        curves.append((label, COLOURS["ours" if server == OURS else "transformers"], dashes, points))
    clients = sorted({x for *_, points in curves for x, _ in points})
    marks = ticks([y for *_, points in curves for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / clients[0]) / (math.log(clients[-1] / clients[0]) or 1)
        up = math.log(y / marks[0]) / (math.log(marks[-1] / marks[0]) or 1)
        return left + across * WIDTH, top + HEIGHT - up * HEIGHT

    parts = [text(left, top - 61, title, bold=True)]
    for mark in marks:
        _, y = place(clients[0], mark)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, f"{mark:g}", end=True))
    for count in clients:
        x, _ = place(count, marks[0])
        parts.append(text(x - 4, top + HEIGHT + 16, str(count)))
    parts.append(text(left + WIDTH, top + HEIGHT + 32, "clients", end=True))
    for number, (label, colour, dashes, points) in enumerate(curves):
        style = f'stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
        y = top - 47 + 13 * number
        parts.append(f'<line x1="{left}" x2="{left + 24}" y1="{y}" y2="{y}" {style}/>')
        parts.append(text(left + 30, y + 4, label))
    return parts


def draw(found: dict[str, Any]) -> str:
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    parts = []
    for number, model in enumerate(models):
        top = TOP + 53 + number * (HEIGHT + TOP + 83)
        rows = [row for row in found["rows"] if row["model"] == model]
        parts.append(text(10, top - 85, f"{model} model, {found['tokens']} tokens an answer", bold=True))
        for column, title in enumerate(LINES):
            parts += chart(LEFT + column * (WIDTH + 2 * LEFT), top, rows, title)
    size = f'width="{2 * (WIDTH + 2 * LEFT)}" height="{len(models) * (HEIGHT + TOP + 83) + 20}"'
    body = "\n".join(parts)
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{background}\n{body}\n</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=DOCS / "benchmarks/serve.json")
    parser.add_argument("--out", type=Path, default=DOCS / "server.svg")
    args = parser.parse_args()
    if not args.results.exists():
        print(f"nothing to draw: write {args.results} with serve.py --json")
        return
    args.out.write_text(draw(json.loads(args.results.read_text(encoding="utf-8"))), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
