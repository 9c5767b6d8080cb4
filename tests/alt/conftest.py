"""Pages of one text, and what becomes of them when all that is missing in them is written."""

from __future__ import annotations

import pytest

from blip2.alt import apply, images_in, read_page
from blip2.alt.report import Row


class Pages:
    def __init__(self, folder):
        self.folder = folder

    def page(self, content: str | bytes, name: str = "page.html"):
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_page(str(path))

    def rows(self, page, text, *, weak=False, approved="yes"):
        """An approved row for each image without a text."""
        return [
            Row(page.path, page.line_of(image.start), image.address, text, None, approved, "",
                (image.alt or "").strip(), "", check)
            for check, image in images_in(page)
            if image.is_missing or (weak and image.is_weak)
        ]  # fmt: skip

    def filled(self, content: str | bytes, text="A cat", name="page.html", **options):
        """The page's bytes afterwards, and the problems."""
        page = self.page(content, name)
        changes = list(apply(self.rows(page, text, **options)))
        for change in changes:
            change.write()
        return (self.folder / name).read_bytes(), [problem for change in changes for problem in change.problems]


@pytest.fixture
def pages(tmp_path):
    return Pages(tmp_path)
