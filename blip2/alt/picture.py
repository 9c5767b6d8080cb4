"""An image as it stands in a page: where, what is said of it, and how a text is put there."""

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
# Each of these means something else to Markdown, somewhere: emphasis, links, code, tables, formulas, entities.
MARKDOWN_MARKS = re.compile(r"[\\\[\]*_`<&|~$]")


@dataclass(frozen=True, slots=True)
class Image:
    """``start`` to ``stop``: all of it in the page's text. ``address``: of its image, as the page gives it, "" if it
    has none. ``alt``: what is said of it; None if nothing is, not even that it is decoration.

    ``edit_start`` to ``edit_stop``: what a text takes the place of, ``before`` and ``after`` around it; a text is
    written within ``quote``. ``identity``: the image's markup without its text, by which it is known again.
    ``wrong``: why it cannot have a text from here, "" if it can.
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
    """Nobody is told of it: decoration, or part of what is hidden from screen readers."""
    is_button: bool = False
    base: str = ""
    """What its address is relative to, if the page says that."""
    wrong: str = ""
    is_in_markdown: bool = False
    """HTML, but within Markdown, where bars divide the cells of a table."""

    @property
    def is_missing(self) -> bool:
        if self.is_hidden or self.alt == "":
            return False
        return self.alt is None or not self.alt.strip()

    @property
    def is_weak(self) -> bool:
        """Whether its text says nothing: a file's name, "image"."""
        alt = (self.alt or "").strip()
        if self.is_hidden or not alt or INSERTION.search(alt):
            return False
        named = self.address.split("?")[0].rpartition("/")[2].rpartition(".")[0].lower()
        return bool(NO_TEXT.fullmatch(alt) or FILE_NAME.fullmatch(alt)) or alt.lower() == named

    def written(self, text: str, encoding: str) -> str:
        """What takes the place of ``edit_start`` to ``edit_stop``; what ``encoding`` lacks becomes a reference."""
        if self.syntax == "markdown":
            text = MARKDOWN_MARKS.sub(r"\\\g<0>", text)
        else:
            text = text.replace("&", "&amp;").replace("<", "&lt;")
            text = text.replace('"', "&quot;") if self.quote == '"' else text.replace("'", "&#39;")
            text = text.replace("|", "&#124;") if self.is_in_markdown else text
        text = text.replace("{", "&#123;").replace("}", "&#125;")  # to templates and MDX these are code
        return self.before + text.encode(encoding, "xmlcharrefreplace").decode(encoding) + self.after
