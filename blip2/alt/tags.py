"""The tags of a page with the exact places of their attributes, parsed as in a browser.

Skipped: comments, scripts and other raw text, CDATA, and template code (PHP, ``<% %>``, ``{{ }}``, ``{% %}``,
``{# #}``). Places are offsets into the given text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape

RAW = frozenset({"script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes"})
"""Elements whose content is text without tags."""

BLANK = " \t\n\f\r"
NO_NAME = BLANK + "/>="
# The end of template code is searched within this many characters, so that a lone "{{" hides no more.
INSERTION = re.compile(
    r"<\?(?:php\b|=).*?(?:\?>|\Z)|<%.{0,5000}?%>|\{\{(?:(?!\{\{).){0,2000}?\}\}|\{%.{0,2000}?%\}|\{#.{0,2000}?#\}",
    re.DOTALL | re.IGNORECASE,
)
NEXT = re.compile(r"<!--|<!\[CDATA\[|<[!?%]|</?[A-Za-z]|\{[{%#]", re.DOTALL)
COMMENT = re.compile(r"<!--(?:-?>|.*?(?:--!?>|\Z))", re.DOTALL)
TAG_NAME = re.compile(r"[^ \t\n\f\r/>]+")
# In an attribute, an entity without ";" is not one before "=" or a letter: "?a=1&copy=2".
REFERENCE = re.compile(r"&(?:#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[A-Za-z][A-Za-z0-9]*(?:;|(?![A-Za-z0-9=])))")


@dataclass(frozen=True, slots=True)
class Attribute:
    """``start`` to ``stop``: its span. ``value_start`` to ``value_stop``: its raw value without quotes. ``quote``: " or
    ', { for a JSX expression, "" if there is none. ``value``: the decoded value."""

    name: str
    start: int
    stop: int
    value_start: int
    value_stop: int
    quote: str
    value: str

    @property
    def has_value(self) -> bool:
        return bool(self.quote) or self.value_stop > self.value_start


@dataclass(frozen=True, slots=True)
class Tag:
    """``name`` in lower case, with "/" before it for an end tag. ``name_stop``: where the name ends. ``is_computed``:
    template code stands between its attributes, so that they are not known."""

    name: str
    start: int
    stop: int
    name_stop: int
    attributes: tuple[Attribute, ...]
    is_computed: bool
    is_closed: bool
    """It ends with "/>"."""

    def get(self, name: str) -> Attribute | None:
        """The first attribute of that name, which browsers use."""
        return next((attribute for attribute in self.attributes if attribute.name == name), None)

    def value(self, name: str) -> str:
        """The value; "" if there is none."""
        return found.value if (found := self.get(name)) is not None else ""


def tags_of(text: str, *, is_xml: bool = False, is_jsx: bool = False) -> Iterator[Tag]:
    """The tags in order. ``is_xml``: "/>" ends any element; ``is_jsx``: attributes may be ``{expressions}``."""
    place = 0
    foreign = 0  # depth within <svg> or <math>, where "/>" ends an element
    while (found := NEXT.search(text, place)) is not None:
        start = found.start()
        if (stop := _ignored_until(text, start)) is not None:
            place = stop
            continue
        if not found[0][-1].isalpha():
            place = start + 1
            continue
        if (tag := _tag(text, start, is_jsx)) is None:
            return  # browsers drop everything from an unclosed tag on
        yield tag
        place = tag.stop
        if tag.name in ("svg", "math") and not tag.is_closed:
            foreign += 1
        elif tag.name in ("/svg", "/math"):
            foreign = max(foreign - 1, 0)
        elif tag.name == "plaintext" and not is_xml:
            return
        elif tag.name in RAW and not is_jsx and not (tag.is_closed and (is_xml or foreign)):
            end = re.compile(rf"</{tag.name}(?=[{BLANK}/>])", re.IGNORECASE).search(text, place)
            place = end.start() if end is not None else len(text)


def _ignored_until(text: str, start: int) -> int | None:
    """The end of a comment, template code or the like that begins here; None if it is a tag."""
    if (insertion := _insertion(text, start)) is not None:
        return insertion
    if (found := COMMENT.match(text, start)) is not None:
        return found.end()
    if text.startswith("<![CDATA[", start) and (end := text.find("]]>", start)) >= 0:
        return end + 3
    if text.startswith(("<!", "<?"), start):
        return end + 1 if (end := text.find(">", start)) >= 0 else len(text)
    return None


def _tag(text: str, start: int, is_jsx: bool) -> Tag | None:
    """None if it is not closed."""
    is_end = text[start + 1] == "/"
    named = TAG_NAME.match(text, start + 1 + is_end)
    assert named is not None
    place, attributes, is_computed = named.end(), list[Attribute](), False
    while place < len(text):
        if text[place] == ">":
            name = "/" * is_end + named[0].lower()
            is_closed = text[place - 1] == "/" and not (attributes and attributes[-1].stop == place)
            return Tag(name, start, place + 1, named.end(), tuple(attributes), is_computed, is_closed)
        if text[place] in BLANK + "/":
            place += 1
        elif (insertion := _insertion(text, place)) is not None:
            is_computed, place = True, insertion
        elif is_jsx and text[place] == "{":  # {...properties}
            is_computed, place = True, _after_braces(text, place)
        else:
            attribute, has_insertion = _attribute(text, place, is_jsx)
            if attribute is None:
                return None
            attributes.append(attribute)
            is_computed, place = is_computed or has_insertion, attribute.stop
    return None


def _attribute(text: str, start: int, is_jsx: bool) -> tuple[Attribute | None, bool]:
    """The attribute that begins here, None if it is not closed; and whether template code is part of its name."""
    place, has_insertion = start, False
    while place < len(text) and (text[place] not in NO_NAME or place == start):
        if (insertion := _insertion(text, place)) is not None:
            has_insertion, place = True, insertion
        else:
            place += 1
    name = text[start:place].lower()
    after = place
    while after < len(text) and text[after] in BLANK:
        after += 1
    if not text.startswith("=", after):
        return Attribute(name, start, place, place, place, "", ""), has_insertion
    after += 1
    while after < len(text) and text[after] in BLANK:
        after += 1
    if after >= len(text):
        return None, False
    quote = text[after]
    if quote in "\"'":
        end = _quoted_end(text, after + 1, quote)
        if end is None:
            return None, False
        return Attribute(name, start, end + 1, after + 1, end, quote, plain(text[after + 1 : end])), has_insertion
    if is_jsx and quote == "{":
        end = _after_braces(text, after)
        return Attribute(name, start, end, after, end, "{", text[after:end]), has_insertion
    end = after
    while end < len(text) and text[end] not in BLANK + ">":
        end = _insertion(text, end) or end + 1
    return Attribute(name, start, end, after, end, "", plain(text[after:end])), has_insertion


def _quoted_end(text: str, start: int, quote: str) -> int | None:
    """The end of a value; quotes within template code do not count."""
    place = start
    mark = re.compile(rf"{quote}|<[?%]|\{{[{{%#]")
    while (found := mark.search(text, place)) is not None:
        if found[0] == quote:
            return found.start()
        place = _insertion(text, found.start()) or found.end()
    return None


def _insertion(text: str, start: int) -> int | None:
    """The end of the template code that begins here, if any."""
    found = INSERTION.match(text, start) if text[start] in "<{" else None
    return found.end() if found is not None else None


def _after_braces(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[{}]|\"[^\"\n]*\"|'[^'\n]*'|`[^`]*`").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    return len(text)


def plain(value: str) -> str:
    """The decoded value of an attribute."""
    return REFERENCE.sub(lambda found: unescape(found[0]), value)
