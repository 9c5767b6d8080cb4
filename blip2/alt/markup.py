"""The images of HTML: ``<img>``, and ``<input type=image>``, whose text names the action of the button.

Left out: ``<area>`` and ``<svg>``, which have no image file, and CSS, which has no alt text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from blip2.alt.image import Image
from blip2.alt.tags import Attribute, Tag, tags_of

VOID = frozenset({
    "area", "base", "basefont", "bgsound", "br", "col", "embed", "frame", "hr", "img", "input", "keygen", "link",
    "meta", "param", "source", "track", "wbr",
})  # fmt: skip
LAZY = ("data-src", "data-lazy-src", "data-original", "data-lazy", "data-url", "data-srcset", "data-lazy-srcset")
"""Attributes in which lazy-loading pages keep the address, while ``src`` holds a placeholder."""
CANDIDATE = re.compile(r"[ \t\n\f\r,]*(?P<address>[^ \t\n\f\r]*[^ \t\n\f\r,])(?:[ \t\n\f\r]+(?P<size>[\d.]+)[wx])?")
COMPUTED = re.compile(r"\{\{|\{%|<%|<\?|\$\{|^\{")


def images_of_html(text: str, *, is_xml: bool = False, is_jsx: bool = False) -> Iterator[Image]:
    """Images in order, also those that have a text; see `Image.is_missing`."""
    base = ""
    hidden: list[str] = []  # open elements from the outermost hidden one on
    for tag in tags_of(text, is_xml=is_xml, is_jsx=is_jsx):
        if tag.name == "base" and not base:
            base = tag.value("href").strip()
        if tag.name == "img" or (tag.name == "input" and tag.value("type").strip().lower() == "image"):
            yield _image(text, tag, base, bool(hidden))
        elif tag.name.startswith("/"):
            if tag.name[1:] in hidden:
                del hidden[len(hidden) - 1 - hidden[::-1].index(tag.name[1:]) :]
        elif (hidden or _hides(tag)) and tag.name not in VOID and not tag.is_closed:
            hidden.append(tag.name)


def _hides(tag: Tag) -> bool:
    return tag.value("aria-hidden").strip().lower() == "true"


def _image(text: str, tag: Tag, base: str, is_within_hidden: bool) -> Image:
    alt = tag.get("alt")
    role = tag.value("role").split()[:1]
    is_hidden = (
        is_within_hidden
        or _hides(tag)
        or [one.lower() for one in role] in (["presentation"], ["none"])
        or bool(tag.value("aria-label").strip() or tag.value("aria-labelledby").strip())
        or tag.is_computed  # it may have an alt text
        or (alt is not None and alt.quote == "{")
        # Angular, Vue, Alpine and others bind it under another name.
        or any(attribute.name in (":alt", "v-bind:alt", "[alt]", "[attr.alt]", "bind:alt", "x-bind:alt", "th:alt")
               for attribute in tag.attributes)
    )  # fmt: skip
    address = _address(tag)
    is_button = tag.name == "input"
    wrong = ""
    if is_button:
        wrong = "a button: its text has to name its action; write it yourself"
    elif COMPUTED.search(address):
        wrong = "its address comes from a template; write the text in the template"
    elif not address:
        wrong = "it has no readable address"
    start, stop, before, after, quote = _edit(tag, alt)
    return Image(
        "html", tag.start, tag.stop, address, alt.value if alt is not None else None, start, stop, before, after, quote,
        _identity(text, tag, alt), is_hidden, is_button, base, wrong,
    )  # fmt: skip


def _address(tag: Tag) -> str:
    for name in LAZY:
        if value := tag.value(name).strip():
            return _largest(value) if name.endswith("srcset") else value
    src, srcset = tag.value("src").strip(), tag.value("srcset").strip()
    if srcset and (not src or src.lower().startswith("data:")):
        return _largest(srcset)
    return src


def _largest(srcset: str) -> str:
    if COMPUTED.search(srcset):
        return srcset
    found = [(float(one["size"] or 1), one["address"]) for one in CANDIDATE.finditer(srcset)
             if re.fullmatch(r"\d+\.?\d*|\.\d+|", one["size"] or "")]  # fmt: skip
    return max(found, key=lambda one: one[0])[1] if found else ""


def _edit(tag: Tag, alt: Attribute | None) -> tuple[int, int, str, str, str]:
    """The span to replace, the strings before and after the text, and the quotes around it."""
    if alt is None:
        source = tag.get("src")
        place = source.stop if source is not None and source.has_value else tag.name_stop
        return place, place, ' alt="', '"', '"'
    if alt.quote:
        return alt.value_start, alt.value_stop, "", "", alt.quote
    if alt.has_value:
        return alt.value_start, alt.value_stop, '"', '"', '"'
    return alt.start, alt.stop, 'alt="', '"', '"'


def _identity(text: str, tag: Tag, alt: Attribute | None) -> str:
    if alt is None:
        return text[tag.start : tag.stop]
    before = text[tag.start : alt.start]
    return before.rstrip() + text[alt.stop : tag.stop]
