"""Pages: finding them in folders, and lossless conversion between their bytes and text."""

from __future__ import annotations

import codecs
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from blip2.errors import CollectionError
from blip2.image import name_of

HTML, XML = frozenset({".html", ".htm", ".xhtml", ".xht"}), frozenset({".xhtml", ".xht"})
MARKDOWN, MDX = frozenset({".md", ".markdown", ".mdown", ".mkd", ".mdx"}), frozenset({".mdx"})
SUFFIXES = HTML | MARKDOWN
LEFT_OUT = ("node_modules",)
"""Folders of third-party pages, skipped in folders but not if named themselves."""

META_BYTES = 1024
CHARSET = re.compile(rb"""<meta[^>]*?charset\s*=\s*["']?\s*([^\s"'/>;]+)""", re.IGNORECASE)
XML_ENCODING = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']+)["']""")
# What browsers read for these names.
WIDER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030",
    "shift_jis": "cp932", "euc_kr": "cp949", "utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8",
}  # fmt: skip
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class Page:
    """``path``: as in messages. ``root``: the folder for addresses that begin with "/", "" if unknown.

    Its bytes are ``mark`` and then ``text`` in ``encoding``. ``new_in``: the encoding for inserted text; "ascii" if the
    page does not declare one.
    """

    path: str
    root: str
    mark: bytes
    text: str
    encoding: str
    new_in: str

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix.lower()

    def bytes_of(self, text: str) -> bytes:
        """The bytes of the page with this text."""
        return self.mark + text.encode(self.encoding, _errors(self.encoding))

    def line_of(self, place: int) -> int:
        """The line number of an offset, from 1."""
        return bisect_right(self._line_ends, place) + 1

    @cached_property
    def _line_ends(self) -> list[int]:
        return [found.end() for found in re.finditer(r"\r\n|\r|\n", self.text)]


def read_page(path: str, root: str = "") -> Page:
    """Read a page. Raises CollectionError if it is no page or could not be written back unchanged; OSError."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise CollectionError(f"{name_of(path)}: not a page; give HTML ({_list(HTML)}) or Markdown ({_list(MARKDOWN)})")
    content = Path(path).read_bytes()
    page = _decoded(path, root, content)
    if page is None or page.bytes_of(page.text) != content:
        raise CollectionError(f"{name_of(path)}: is not in the encoding that it declares; save it as UTF-8")
    if "\0" in page.text:
        raise CollectionError(f"{name_of(path)}: contains NUL bytes; save it as UTF-8")
    return page


def _decoded(path: str, root: str, content: bytes) -> Page | None:
    mark, encoding = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", ""))
    new_in = encoding
    if not encoding and Path(path).suffix.lower() in HTML:
        encoding = new_in = _declared(content)
    if not encoding:
        encoding = "utf-8"
        try:
            # Markdown without a declaration is UTF-8; for HTML browsers guess from the content.
            is_utf_8 = bool(content.decode("utf-8").strip()) and not content.isascii()
            new_in = "utf-8" if is_utf_8 or Path(path).suffix.lower() not in HTML - XML else "ascii"
        except UnicodeDecodeError:
            new_in = "ascii"
    try:
        text = content[len(mark) :].decode(encoding, _errors(encoding))
        page = Page(path, root, mark, text, encoding, new_in)
        page.bytes_of(text)
    except UnicodeError:
        return None
    return page


def _declared(content: bytes) -> str:
    """The declared encoding under Python's name; "" if there is none that is known."""
    head = content[:META_BYTES]
    found = XML_ENCODING.match(head) or CHARSET.search(head)
    if found is None:
        return ""
    try:
        known = codecs.lookup(found[1].decode("ascii"))
        is_like_ascii = "<img alt=''>".encode(known.name) == b"<img alt=''>"
    except (LookupError, UnicodeError, TypeError):
        return ""
    name = WIDER.get(known.name, known.name)
    return name if is_like_ascii or name == "utf-8" else ""


def _errors(encoding: str) -> str:
    return "surrogatepass" if encoding.startswith("utf-16") else "surrogateescape"


@dataclass
class FoundPages:
    """Each page with the folder in which it was found ("" if it was named itself)."""

    pages: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_pages(places: Iterable[str], *, recursive: bool = True, exclude: Sequence[str] = ()) -> FoundPages:
    """Pages by name and in folders, in order. Hidden files, ``exclude`` and `LEFT_OUT` are skipped in folders."""
    found = FoundPages()
    for place in places:
        if not os.path.isdir(place):
            found.pages.append((place, ""))
            continue
        inside = sorted(_within(place, recursive, (*exclude, *LEFT_OUT), found.problems))
        found.pages += [(path, place) for path in inside]
        if not inside:
            found.problems.append(f"{name_of(place)}: there are no pages in this folder ({_list(SUFFIXES)})")
    first: dict[str, tuple[str, str]] = {}
    for path, root in found.pages:
        first.setdefault(os.path.realpath(path), (path, root))
    found.pages = [*first.values()]
    return found


def _within(top: str, recursive: bool, exclude: Sequence[str], problems: list[str]) -> Iterable[str]:
    def tell(error: OSError) -> None:
        problems.append(f"{name_of(error.filename)}: cannot be read ({error.strerror}); check its permissions")

    def is_wanted(folder: str, name: str) -> bool:
        within = os.path.relpath(os.path.join(folder, name), top)
        return not name.startswith(".") and not any(
            fnmatchcase(one, pattern) for one in (name, within) for pattern in exclude
        )

    for folder, folders, names in os.walk(top, onerror=tell):
        folders[:] = [name for name in folders if recursive and is_wanted(folder, name)]
        for name in names:
            path = os.path.join(folder, name)
            if Path(name).suffix.lower() in SUFFIXES and is_wanted(folder, name) and os.path.isfile(path):
                yield path


def _list(suffixes: Iterable[str]) -> str:
    return ", ".join(sorted(suffixes))
