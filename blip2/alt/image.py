"""An image in a page: its place, its text, and how a text is inserted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from blip2.alt.tags import INSERTION

Syntax = Literal["html", "markdown"]

NO_TEXT = re.compile(
    r"(?:an? |the )?(?:alt|alt ?text|image|img|picture|photo(?:graph)?|pic|graphic|logo|icon|figure|screenshot|"
    r"untitled|placeholder|todo|tbd|none|null|undefined|spacer|description)(?:[ _-]?\d*)?[.:]?|\W+|\d+|"
    r"(?:IMG|DSC[NF]?|PXL|MVIMG|Screenshot|Screen ?Shot)[ _-]?\d[\w.: -]*",
    re.IGNORECASE,
)
FILE_NAME = re.compile(r"\S+\.(?:jpe?g|png|gif|webp|avif|svg|bmp|tiff?|heic)", re.IGNORECASE)
# These have a meaning in some Markdown: emphasis, links, code, tables, formulas, entities.
MARKDOWN_MARKS = re.compile(r"[\\\[\]*_`<&|~$]")


@dataclass(frozen=True, slots=True)
class Image:
    """``start`` to ``stop``: its span in the page's text. ``address``: its address as the page gives it, "" if there is
    none. ``alt``: its text; None if it has none and is not marked as decorative.

    ``edit_start`` to ``edit_stop``: the span that a text replaces, with ``before`` and ``after`` around it and written
    within ``quote``. ``identity``: the image's markup without its text, by which it is recognised. ``wrong``: why it
    cannot get a text from here, "" if it can.
    """

    syntax: Syntax
    start: int
    stop: int
    address: str
    alt: str | None
    edit_start: int
    edit_stop: int
    before: str
    after: str
    quote: str
    identity: str
    is_hidden: bool = False
    """Screen readers skip it: decorative, or within something hidden."""
    is_button: bool = False
    base: str = ""
    """The base of its address, if the page declares one."""
    wrong: str = ""
    is_in_markdown: bool = False
    """HTML within Markdown, where bars separate the cells of a table."""

    @property
    def is_missing(self) -> bool:
        if self.is_hidden or self.alt == "":
            return False
        return self.alt is None or not self.alt.strip()

    @property
    def is_weak(self) -> bool:
        """Whether its text is useless: a file name, "image"."""
        alt = (self.alt or "").strip()
        if self.is_hidden or not alt or INSERTION.search(alt):
            return False
        named = self.address.split("?")[0].rpartition("/")[2].rpartition(".")[0].lower()
        return bool(NO_TEXT.fullmatch(alt) or FILE_NAME.fullmatch(alt)) or alt.lower() == named

    def written(self, text: str, encoding: str) -> str:
        """The replacement of ``edit_start`` to ``edit_stop``; characters missing in ``encoding`` become references."""
        if self.syntax == "markdown":
            text = MARKDOWN_MARKS.sub(r"\\\g<0>", text)
        else:
            text = text.replace("&", "&amp;").replace("<", "&lt;")
            text = text.replace('"', "&quot;") if self.quote == '"' else text.replace("'", "&#39;")
            text = text.replace("|", "&#124;") if self.is_in_markdown else text
        text = text.replace("{", "&#123;").replace("}", "&#125;")  # code in templates and MDX
        return self.before + text.encode(encoding, "xmlcharrefreplace").decode(encoding) + self.after
