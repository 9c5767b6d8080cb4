"""Rows from JSON-lines files: one object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blip2.data.foreign import WANTED, advice
from blip2.data.sample import Row, parse_row
from blip2.errors import RecipeError
from blip2.plaintext import NotTextError, read_lines, read_text

LARGEST_WHOLE = 2**28


def read_rows(files: Sequence[Path], images: Path | None = None) -> list[Row]:
    """All rows, in order, with complete image paths: relative to ``images``, or else to the folder of the file.

    Raises RecipeError with file and line for the first unusable line.
    """
    rows: list[Row] = []
    for file in files:
        root = images or file.parent
        try:
            for number, line in enumerate(read_lines(file), start=1):
                if line.strip():
                    row = row_of_line(line, file, number)
                    rows.append(replace(row, image=str(root / row.image)))
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read ({error.strerror}); name a file of rows") from None
        except NotTextError as error:
            raise RecipeError(f"{file}: {error}; {WANTED}") from None
    if not rows:
        raise RecipeError(f"{', '.join(map(str, files)) or 'rows'}: has no rows; {WANTED}")
    return rows


def row_of_line(line: str | bytes, file: Path, number: int) -> Row:
    """Raises RecipeError with file and line."""
    place = f"{file}:{number}"
    try:
        row = parse_row(json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
        if (whole := _whole(file)) is not None:
            raise RecipeError(f"{file}: {advice(whole)}") from None
        reason = f"{error.msg} at {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise RecipeError(f"{place}: is not JSON ({reason}); {WANTED}") from None
    except ValueError as error:
        raise RecipeError(f"{place}: {error}") from None
    if re.match("https?://", row.image, re.IGNORECASE):
        raise RecipeError(
            f"{place}: {row.image} is a URL; download the images first, for example with img2dataset, and name its "
            "shards as data.sources"
        )
    return row


def _whole(file: Path) -> object:
    """The JSON value if a file is one value over several lines, as other tools write rows; or None."""
    if file.stat().st_size > LARGEST_WHOLE:
        return None
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError):
        return None
