"""Rows from JSON-lines files: one object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blip2.data.sample import Row, parse_row
from blip2.errors import RecipeError


def read_rows(files: Sequence[Path], images: Path | None = None) -> list[Row]:
    """All rows, in order, each picture's path made whole: from ``images``, or else from the folder of its file.

    Raises RecipeError with file and line for the first line that cannot be used.
    """
    rows: list[Row] = []
    for file in files:
        root = images or file.parent
        try:
            lines = file.open(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read ({error.strerror}); name a file of rows") from None
        with lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = parse_row(json.loads(line))
                except json.JSONDecodeError as error:
                    raise RecipeError(f"{file}:{number}: not JSON ({error.msg} at {error.colno})") from None
                except ValueError as error:
                    raise RecipeError(f"{file}:{number}: {error}") from None
                rows.append(replace(row, image=str(root / row.image)))
    if not rows:
        raise RecipeError(f"{', '.join(map(str, files)) or 'rows'}: no rows in it")
    return rows
