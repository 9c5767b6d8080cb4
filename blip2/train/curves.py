"""Losses, scores and rates of trainings as hand-written SVG, with one panel for each quantity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from blip2.errors import RecipeError

LOG = "log.jsonl"
COUNTS = ("step", "cut_texts", "bad_pictures")
"""Values of a log line that are not drawn as curves."""
LAST = (
    "learning_rate", "gradient_norm", "skipped", "images_per_s", "tokens_per_s", "mfu", "peak_memory_mb",
)  # fmt: skip
"""Curves that are neither losses nor scores; they are drawn last."""
COLOURS = ("#3b6fd4", "#d9622b", "#2f9e62", "#b0409f", "#8a6d00", "#0b8aa0", "#c2344d", "#6b6b76")
WIDTH, HEIGHT, COLUMNS = 440, 250, 2
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 36
LINE = 22
MOST_POINTS = 600
STYLE = """
.curves { font: 12px system-ui, sans-serif; background: #fff; }
.curves text { fill: #55555c; } .curves .title { fill: #1c1c1e; font-weight: 600; font-size: 13px; }
.curves .grid { stroke: #e2e2e6; } .curves .frame { stroke: #9a9aa2; fill: none; }
@media (prefers-color-scheme: dark) {
  .curves { background: #161618; } .curves text { fill: #a8a8b0; } .curves .title { fill: #ececf0; }
  .curves .grid { stroke: #303035; } .curves .frame { stroke: #6a6a72; }
}
"""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """The log of a training, by step: ``trained`` at each report, ``evaluated`` on held-out rows."""

    name: str
    trained: dict[str, Points]
    evaluated: dict[str, Points]


def read_run(path: Path) -> Run:
    """Read the folder or the log of a training. Raises RecipeError, also if there is nothing to draw."""
    file = path / LOG if path.is_dir() else path
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        reason = f"it has no {LOG}" if path.is_dir() else error.strerror or error
        raise RecipeError(f"{path}: {reason}; name the 'out' folder of a training") from None
    run = Run(str(path if path.is_dir() else path.parent), {}, {})  # as given: two last names may be equal
    for line in lines:
        try:
            values = json.loads(line)
            step = float(values["step"])
        except (ValueError, LookupError, TypeError):  # the last line of a run that was killed
            continue
        evaluation = values.pop("evaluation", {})
        for found, curves in ((values, run.trained), (evaluation, run.evaluated)):
            for name, value in found.items():
                if name not in COUNTS and _is_number(value):
                    curves.setdefault(name, []).append((step, float(value)))
    if not (run.trained or run.evaluated):
        raise RecipeError(f"{file}: has no line of numbers yet; wait for the first report, or name another run")
    return run


def draw(runs: Sequence[Run]) -> str:
    """An SVG image with a panel for each quantity and a colour for each run. Evaluations are drawn as dots."""
    names = _in_order(runs)
    top = LINE * len(runs) + 14
    height = top + math.ceil(len(names) / COLUMNS) * HEIGHT
    width = COLUMNS * WIDTH
    parts = list(_legend(runs))
    for number, name in enumerate(names):
        row, column = divmod(number, COLUMNS)
        parts.append(f'<g transform="translate({column * WIDTH} {top + row * HEIGHT})">')
        parts += _panel(name, runs)
        parts.append("</g>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="Curves of training">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _in_order(runs: Sequence[Run]) -> list[str]:
    """Names of the quantities: losses, scores, then the rest."""
    names = dict.fromkeys(name for run in runs for name in (*run.trained, *run.evaluated))
    losses = [name for name in names if name not in LAST and any(name in run.trained for run in runs)]
    scores = [name for name in names if name not in LAST and name not in losses]
    return [*losses, *scores, *(name for name in LAST if name in names)]


def _legend(runs: Sequence[Run]) -> Iterator[str]:
    for number, run in enumerate(runs):
        y = 10 + number * LINE + LINE / 2
        label = escape(run.name)
        if any(name in run.trained for name in run.evaluated):
            label += " (line: training, dots: held-out rows)"
        yield f'<line x1="{LEFT}" x2="{LEFT + 26}" y1="{y}" y2="{y}" stroke="{_colour(number)}" stroke-width="2.5"/>'
        yield f'<text x="{LEFT + 34}" y="{y + 4}">{label}</text>'


def _panel(name: str, runs: Sequence[Run]) -> Iterator[str]:
    curves = [
        (number, is_dotted, _thinned(found[name]))
        for number, run in enumerate(runs)
        for is_dotted, found in ((False, run.trained), (True, run.evaluated))
        if name in found
    ]
    steps, values = ([point[axis] for *_, points in curves for point in points] for axis in (0, 1))
    across = _ticks(min(0.0, *steps), max(steps))
    up = _ticks(min(values), max(values))
    x_of = _scale((across[0], max(*steps, across[0] + 1)), (LEFT, WIDTH - RIGHT))
    y_of = _scale((min(up[0], *values), max(up[-1], *values)), (HEIGHT - BOTTOM, TOP))
    yield f'<text class="title" x="{LEFT}" y="{TOP - 12}">{escape(name.replace("_", " "))}</text>'
    for tick in up:
        y = y_of(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
    for tick in across:
        if tick <= max(steps):
            yield f'<text x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:,.0f}</text>'
    yield (
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    )
    for number, is_dotted, points in curves:
        drawn = [(x_of(step), y_of(value)) for step, value in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        dashes = ' stroke-dasharray="2 3"' if is_dotted else ""
        yield f'<polyline points="{path}" fill="none" stroke="{_colour(number)}" stroke-width="1.6"{dashes}/>'
        if is_dotted or len(drawn) == 1:
            yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{_colour(number)}"/>' for x, y in drawn)


def _scale(values: tuple[float, float], pixels: tuple[float, float]) -> Any:
    (first, last), (start, end) = values, pixels
    length = (last - first) or 1.0
    return lambda value: start + (value - first) / length * (end - start)


def _ticks(least: float, most: float, number: int = 5) -> list[float]:
    """About ``number`` round numbers, from below ``least`` to ``most`` or above."""
    span = (most - least) or abs(most) or 1.0
    power = 10.0 ** math.floor(math.log10(span / number))
    size = next(size for size in (power, 2 * power, 5 * power, 10 * power) if span / size <= number)
    first = math.floor(least / size)
    return [each * size for each in range(first, max(math.ceil(most / size), first + 1) + 1)]


def _thinned(points: Points) -> Points:
    """Means of neighbouring points, if there are more points than pixels can show."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in groups]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
