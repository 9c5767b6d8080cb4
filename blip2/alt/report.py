"""The report for review: a table that spreadsheets open, read back in whatever form they save it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from blip2.collection.wording import clean
from blip2.errors import CollectionError
from blip2.image import name_of
from blip2.plaintext import ENCODINGS

YES = frozenset({"yes", "y", "x", "true", "1", "ok"})
NO = frozenset({"", "no", "n", "false", "0"})
DECORATIVE = "decorative"
RISKY = "=+-@\t\r'"
"""A cell that begins with one of these is a formula to a spreadsheet, or marked as text."""
MAX_ADDRESS_CHARS = 500
NEEDED = ("file", "alt", "approved", "check")


@dataclass(frozen=True)
class Row:
    """An image of a page. ``file``: the page as named when the report was made, with "/". ``image``: its file or URL.
    ``alt``: the new text. ``old``: the existing one. ``approved``: yes, or decorative for an image that needs no text;
    rows without it are not applied. ``problem``: why there is no text. ``check``: identifies the image in the page."""

    file: str
    line: int
    image: str
    alt: str
    score: float | None
    approved: str
    context: str
    old: str
    problem: str
    check: str

    @property
    def is_decorative(self) -> bool:
        return self.approved.strip().lower() == DECORATIVE

    @property
    def is_approved(self) -> bool:
        """Raises CollectionError for an unclear word."""
        value = self.approved.strip().lower()
        if value in YES or self.is_decorative:
            return True
        if value in NO:
            return False
        raise CollectionError(f"approved is {self.approved!r}; write yes, decorative, or nothing")


COLUMNS = tuple(field.name for field in fields(Row))


def csv_of(rows: Iterable[Row]) -> bytes:
    """The table with a byte order mark, by which spreadsheets recognise UTF-8. No cell is a formula, whatever a page
    says."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\r\n")
    table.writerow(COLUMNS)
    for row in rows:
        score = "" if row.score is None else f"{row.score:.4f}"
        table.writerow([score if name == "score" else _safe(str(getattr(row, name))) for name in COLUMNS])
    return stream.getvalue().encode("utf-8-sig", "replace")


def read_report(path: Path) -> list[Row]:
    """The rows of a report, with commas, semicolons or tabs, in UTF-8, UTF-16 or a Windows encoding. Columns may be in
    any order, and others may be added. Raises CollectionError, OSError."""
    text = _text(path)
    lines = text.splitlines(keepends=True)
    if lines and lines[0].lower().startswith("sep="):
        text = text[len(lines[0]) :]
    head = text.lstrip("\r\n").split("\n", 1)[0].strip()
    for delimiter in (",", ";", "\t"):
        names = [name.strip().lower() for name in next(csv.reader([head], delimiter=delimiter), [])]
        if set(NEEDED) <= set(names):
            break
    else:
        raise CollectionError(
            f"{path}: is not a report of blip2 alt: its first line lacks the columns {', '.join(NEEDED)}"
        )
    csv.field_size_limit(2**24)
    try:
        table = list(csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter))[1:]
    except csv.Error as error:
        raise CollectionError(f"{path}: cannot be read as a table ({error}); save it as CSV") from None
    return [
        _row({name: _unsafe(cell) for name, cell in zip(names, cells, strict=False)})
        for cells in table
        if any(cell.strip() for cell in cells)
    ]


def check_file(name: str) -> str:
    """A page's name for the report. Raises CollectionError for an impossible one."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise CollectionError(f"{name_of(name)}: its name is not UTF-8, as a report needs it; rename it") from None
    if clean(name) != name and any(not character.isprintable() for character in name):
        raise CollectionError(f"{name!r}: the name has control characters, which a report cannot hold; rename it")
    return name


def _text(path: Path) -> str:
    content = path.read_bytes()
    encoding = next((name for mark, name in ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")  # the encoding of Excel's "CSV" in western countries


def _row(cells: dict[str, str]) -> Row:
    return Row(
        cells.get("file", "").strip(), _number(cells.get("line", "")), cells.get("image", ""),
        " ".join(clean(cells.get("alt", "")).split()), None, cells.get("approved", ""), cells.get("context", ""),
        cells.get("old", ""), cells.get("problem", ""), cells.get("check", "").strip(),
    )  # fmt: skip


def _number(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def _safe(cell: str) -> str:
    return f"'{cell}" if cell.startswith(tuple(RISKY)) else cell


def _unsafe(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(tuple(RISKY)) else cell


