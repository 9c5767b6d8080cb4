"""The images of Markdown: ``![](a.png)``, ``![][reference]``, and the HTML in it.

markdown-it-py decides what is an image and what is code. Its rules are wrapped to note where each image begins in the
text of its paragraph; that text is then located, line by line, in the page.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from blip2.alt.image import Image
from blip2.alt.markup import COMPUTED, images_of_html

FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\n.*?\n(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
JSX_COMMENT = re.compile(r"\{/\*.*?\*/\}", re.DOTALL)
LINE_END = re.compile(r"\r\n|\r|\n")
LABEL_BLANKS = re.compile(r"[^\n]*")


def images_of_markdown(text: str, *, is_mdx: bool = False) -> Iterator[Image]:
    """Images in order, also those that have a text."""
    page = _Page(text)
    # Blank out what is not Markdown, so that line numbers stay the same.
    shown = LINE_END.sub("\n", text)
    if (front := FRONT_MATTER.match(shown)) is not None:
        shown = _blanked(front) + shown[front.end() :]
    if is_mdx:
        shown = JSX_COMMENT.sub(_blanked, shown)
    parser = _parser(is_mdx)
    for token in parser.parse(shown):
        if token.map is None or not token.content:
            continue
        if token.type == "html_block":
            yield from _of_html(page.placed(token), token.content, is_mdx)
        elif token.type == "inline":
            placed = page.placed(token)
            yield from _of_inline(parser, placed, token, is_mdx)


def _blanked(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


@cache
def _parser(is_mdx: bool) -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    if is_mdx:  # MDX has no indented code, and has Markdown within elements
        parser.disable(["code", "html_block"])
    for name in ("image", "html_inline"):
        rules = {rule.name: rule.fn for rule in parser.inline.ruler.__rules__}
        parser.inline.ruler.at(name, _noting(rules[name]))
    return parser


def _noting(rule: Callable[[Any, bool], bool]) -> Callable[[Any, bool], bool]:
    """A rule of markdown-it that records where its tokens begin and end."""

    def noted(state: Any, silent: bool) -> bool:
        start, number = state.pos, len(state.tokens)
        done = rule(state, silent)
        if done and not silent and len(state.tokens) > number:
            state.tokens[-1].meta["span"] = (start, state.pos)
        return done

    return noted


@dataclass(frozen=True)
class _Placed:
    """A token's content. Each line, beginning at one of ``starts``, is at the offset ``places`` in the page; -1 if it
    was not found."""

    page: str
    content: str
    starts: list[int]
    places: list[int]

    def at(self, offset: int) -> int:
        line = bisect_right(self.starts, offset) - 1
        return -1 if self.places[line] < 0 else self.places[line] + offset - self.starts[line]

    def span(self, start: int, stop: int) -> tuple[int, int] | None:
        """The span of a part of the content in the page; None if the page has different text there."""
        first, last = self.at(start), self.at(max(stop - 1, start)) + (stop > start)
        if first < 0 or last < first:
            return None
        there = LINE_END.sub("\n", self.page[first:last]).replace("\\|", "|")
        here = self.content[start:stop].replace("\\|", "|")
        # The marks of a block quote stand between its lines.
        is_same = there == here if "\n" not in here else (
            there.startswith(here.split("\n")[0]) and there.endswith(here.split("\n")[-1])
        )  # fmt: skip
        return (first, last) if is_same else None


class _Page:
    """A page's lines, and how far each has been searched: the cells of a table share one."""

    def __init__(self, text: str) -> None:
        self._text = text
        ends = [(found.start(), found.end()) for found in LINE_END.finditer(text)]
        starts = [0, *(end for _, end in ends)]
        stops = [*(start for start, _ in ends), len(text)]
        self._lines = [(start, text[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        self._looked: defaultdict[int, int] = defaultdict(int)

    def placed(self, token: Token) -> _Placed:
        assert token.map is not None
        starts, places, offset = list[int](), list[int](), 0
        for number, line in enumerate(token.content.split("\n"), start=token.map[0]):
            for start, place in self._pieces(number, line.rstrip()):
                starts.append(offset + start)
                places.append(place)
            offset += len(line) + 1
        return _Placed(self._text, token.content, starts, places)

    def _pieces(self, number: int, line: str) -> list[tuple[int, int]]:
        """Pairs of offsets, in the line of the content and in the page."""
        if number < len(self._lines):
            start, text = self._lines[number]
            # In a table the backslash before a bar is not part of the content.
            for bar in ("|", "\\|"):
                if (found := text.find(line.replace("|", bar), self._looked[number])) >= 0:
                    self._looked[number] = found + len(line.replace("|", bar))
                    bars = [0, *(index for index, character in enumerate(line) if character == "|" and len(bar) > 1)]
                    return [(at, start + found + at + extra) for extra, at in enumerate(bars)]
        return [(0, -1)]


def _of_inline(parser: MarkdownIt, placed: _Placed, token: Token, is_mdx: bool) -> Iterator[Image]:
    for child in token.children or ():
        if "span" not in child.meta:
            continue
        start, stop = child.meta["span"]
        if child.type == "html_inline":
            yield from _of_html(placed, token.content, is_mdx, start, stop)
            continue
        if (image := _image(parser, placed, start, stop, child)) is not None:
            yield image


def _image(parser: MarkdownIt, placed: _Placed, start: int, stop: int, token: Token) -> Image | None:
    """The image at this part of the content; None if its place is unknown."""
    label = token.content
    blanks = LABEL_BLANKS.match(label)
    written = len(label) if label.strip() or blanks is None else blanks.end()  # not across the end of a line
    span, edit = placed.span(start, stop), placed.span(start + 2, start + 2 + written)
    if span is None or edit is None:
        return None
    renderer: Any = parser.renderer
    alt = renderer.renderInlineAsText(token.children, parser.options, {}).strip() or label.strip()
    address = unquote(str(token.attrs["src"]), errors="surrogateescape")  # markdown-it percent-encodes it
    wrong = ""
    if COMPUTED.search(address):
        wrong = "its address comes from a template; write the text in the template"
    elif not address:
        wrong = "it has no readable address"
    return Image(
        "markdown", *span, str(token.attrs["src"]), alt or None, *edit, "", "", "",
        f"![{placed.content[start + 2 + len(label) : stop]}", wrong=wrong,
    )  # fmt: skip


def _of_html(placed: _Placed, content: str, is_jsx: bool, start: int = 0, stop: int | None = None) -> Iterator[Image]:
    """The images of HTML in a part of a token's content, with their places in the page."""
    for image in images_of_html(content[start:stop], is_jsx=is_jsx):
        span = placed.span(start + image.start, start + image.stop)
        edit = placed.span(start + image.edit_start, start + image.edit_stop)
        if span is not None and edit is not None:
            yield replace(
                image, start=span[0], stop=span[1], edit_start=edit[0], edit_stop=edit[1], is_in_markdown=True
            )
