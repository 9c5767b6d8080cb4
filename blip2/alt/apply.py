"""Writes approved texts into the pages: changes the bytes of these attributes, and no others."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from blip2.alt.image import Image
from blip2.alt.pages import Page, read_page
from blip2.alt.report import Row
from blip2.alt.scan import images_in
from blip2.disk import write_bytes
from blip2.errors import CollectionError


@dataclass
class Change:
    """A changed page. ``done``: rows with their line numbers. ``num_before``: texts that were already there.
    ``problems``: why other rows were not applied, one line each. ``text``: the page's new text."""

    path: str
    page: Page | None = None
    text: str = ""
    done: list[tuple[int, Row]] = field(default_factory=list)
    num_before: int = 0
    problems: list[str] = field(default_factory=list)

    def diff(self) -> str:
        """The change in the form of ``diff -u``; "" if there is none."""
        if self.page is None:
            return ""
        old, new = (text.replace("\r\n", "\n").split("\n") for text in (self.page.text, self.text))
        return "\n".join(difflib.unified_diff(old, new, self.path, self.path, lineterm="", n=1))

    def write(self) -> None:
        """Write atomically. Raises OSError; CollectionError if another program has written the page meanwhile."""
        if self.page is None or not self.done:
            return
        with open(self.path, "rb") as file:
            if file.read() != self.page.bytes_of(self.page.text):
                raise CollectionError("has just been changed; apply the report again")
        write_bytes(self.path, self.page.bytes_of(self.text))


def apply(rows: Iterable[Row]) -> Iterator[Change]:
    """The change of each page that rows name. Nothing is written before `Change.write`.

    A row is only applied if its image is in the page as when the report was made. Texts that are already there are not
    written again; a text that a person wrote meanwhile is kept.
    """
    for file, some in groupby(sorted(rows, key=lambda row: row.file), key=lambda row: row.file):
        path = file.replace("/", os.sep)
        yield _change(path, list(some))


def _change(path: str, rows: Sequence[Row]) -> Change:
    change = Change(path)
    approved = [row for row in rows if _is_approved(row, change)]
    if not approved:
        return change
    try:
        page = read_page(path)
    except FileNotFoundError:
        change.problems.append(f"{path}: no such page; run this in the folder where the report was made")
        return change
    except (CollectionError, OSError) as error:
        change.problems.append(str(error) if isinstance(error, CollectionError) else f"{path}: {error.strerror}")
        return change
    images = dict(images_in(page))
    edits: dict[str, tuple[Image, Row]] = {}
    for row in sorted(approved, key=lambda row: row.line):
        problem = _problem(images.get(row.check), row)
        if problem:
            change.problems.append(f"{path}:{row.line}: {problem}")
        elif _has(images[row.check], row):
            change.num_before += 1
        elif row.check in edits:
            change.problems.append(f"{path}:{row.line}: is in the report twice; the first row was used")
        else:
            edits[row.check] = (images[row.check], row)
    change.page, change.text = page, _edited(page, [*edits.values()])
    if _is_as_wanted(change, images, edits):
        change.done = [(page.line_of(image.start), row) for image, row in edits.values()]
    else:
        change.text = page.text
        change.problems.append(f"{path}: these texts cannot be written safely; write them yourself")
    return change


def _is_approved(row: Row, change: Change) -> bool:
    try:
        return row.is_approved
    except CollectionError as error:
        change.problems.append(f"{change.path}:{row.line}: {error}")
        return False


def _problem(image: Image | None, row: Row) -> str:
    """Why a row cannot be applied, "" if it can."""
    if image is None:
        return "the page has changed here since the report was made; make a new report"
    if _has(image, row):
        return ""
    if row.is_decorative and image.syntax != "html":
        return "Markdown cannot mark an image as decorative; write <img src=... alt=\"\">"
    if not row.alt and not row.is_decorative:
        return "approved without a text; write one, or mark it as decorative"
    if image.is_hidden or image.alt == "":
        return "has been marked as decorative since the report was made; left unchanged"
    if (image.alt or "").split() != row.old.split():
        return f"has got another text since the report was made, {image.alt!r}; left unchanged"
    return ""


def _wanted(row: Row) -> str:
    return "" if row.is_decorative else row.alt


def _has(image: Image, row: Row) -> bool:
    return image.alt is not None and image.alt == _wanted(row) and (row.is_decorative or bool(row.alt))


def _edited(page: Page, edits: Sequence[tuple[Image, Row]]) -> str:
    pieces, place = list[str](), 0
    for image, row in sorted(edits, key=lambda edit: edit[0].edit_start):
        pieces += [page.text[place : image.edit_start], image.written(_wanted(row), page.new_in)]
        place = image.edit_stop
    return "".join(pieces) + page.text[place:]


def _is_as_wanted(change: Change, images: dict[str, Image], edits: dict[str, tuple[Image, Row]]) -> bool:
    """Whether the new page, parsed again, has these texts and is otherwise unchanged."""
    assert change.page is not None
    page = change.page
    after = dict(images_in(Page(page.path, page.root, page.mark, change.text, page.encoding, page.new_in)))
    return [*after] == [*images] and all(
        after[name].alt == (_wanted(edits[name][1]) if name in edits else image.alt) for name, image in images.items()
    )
