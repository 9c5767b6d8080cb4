"""Reads and changes XMP: inserts two descriptions into a packet and keeps every other byte.

A packet can be written in many ways (a property as an attribute or an element, any prefixes), and holds what other
programs know of an image. So it is never parsed and serialised again: a parser only locates the two properties.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape

from blip2.collection.needs import need
from blip2.errors import CollectionError

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DESCRIPTION = ("http://purl.org/dc/elements/1.1/", "dc", "description")
ALT_TEXT = ("http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/", "Iptc4xmpCore", "AltTextAccessibility")
XML = "http://www.w3.org/XML/1998/namespace"
DEFAULT = "x-default"
ATTRIBUTE = re.compile(rb"""\s+([^\s=<>"']+)\s*=\s*(?:"[^"]*"|'[^']*')""")

Property = tuple[str, str, str]

NEW = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


@dataclass
class Element:
    """``start`` to ``inner`` is its start tag, ``end`` is after its end tag: byte offsets in the packet."""

    name: str
    attributes: Mapping[str, str]
    prefixes: Mapping[str, str]
    start: int
    inner: int = 0
    outer: int = 0
    end: int = 0
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self) -> Iterator[Element]:
        """This element and its descendants, in the order of the packet."""
        waiting = [self]
        while waiting:
            element = waiting.pop()
            yield element
            waiting += reversed(element.children)


def described(content: bytes, name: str) -> str:
    """The description in a packet, "" if there is none. Raises CollectionError if it is not XMP."""
    for holder in _holders(_parsed(content, name)):
        if found := _text(holder, DESCRIPTION):
            return found
    return ""


def with_texts(content: bytes | None, texts: Mapping[Property, str], name: str) -> bytes:
    """A packet with these properties, in the language "x-default"; None: a new one. Other properties are unchanged.

    Raises CollectionError if it is not XMP.
    """
    content = NEW.encode("utf-8") if content is None else content
    for wanted, text in texts.items():
        content = _with_text(content, wanted, text, name)
    return content


# ---- reading ----


def _parsed(content: bytes, name: str) -> Element:
    """The tree, with the position of each element. defusedxml refuses entities and external files first."""
    defused: Any = need("defusedxml.ElementTree", "XMP")
    try:
        content.decode("utf-8")
        defused.fromstring(content, forbid_dtd=True)
    except UnicodeDecodeError:
        raise CollectionError(f"{name}: is not UTF-8, as XMP sidecars have to be; convert or remove it") from None
    except (ValueError, SyntaxError) as error:  # defusedxml's and ElementTree's
        reason = " ".join(str(error).split())
        raise CollectionError(f"{name}: is damaged or not XMP ({reason}); fix or remove it") from None
    root = _Reader(content).root
    if not any(element.name == f"{{{RDF}}}RDF" for element in root.all()):
        raise CollectionError(f"{name}: is not XMP (it has no rdf:RDF); fix or remove it")
    return root


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._stack: list[Element] = []
        self._prefixes: list[dict[str, str]] = [{"xml": XML}]
        self.root = Element("", {}, {}, 0)
        self._parser = expat.ParserCreate("utf-8")
        self._parser.ordered_attributes = False
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.Parse(content, True)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        prefixes = dict(self._prefixes[-1])
        for key, value in attributes.items():
            if key == "xmlns" or key.startswith("xmlns:"):
                prefixes[key[6:]] = value
        self._prefixes.append(prefixes)
        start = self._parser.CurrentByteIndex
        expanded = {self._full(key, prefixes, is_attribute=True): value for key, value in attributes.items()}
        full_name = self._full(name, prefixes)
        element = Element(full_name, expanded, prefixes, start, inner=_end_of_tag(self._content, start))
        (self._stack[-1].children.append(element) if self._stack else setattr(self, "root", element))
        self._stack.append(element)

    def _end(self, name: str) -> None:
        self._prefixes.pop()
        element = self._stack.pop()
        is_closed = self._content[element.inner - 2 : element.inner] == b"/>"
        element.outer = element.inner if is_closed else self._parser.CurrentByteIndex
        element.end = element.inner if is_closed else _end_of_tag(self._content, element.outer)

    def _text(self, text: str) -> None:
        self._stack[-1].text += text

    @staticmethod
    def _full(name: str, prefixes: Mapping[str, str], *, is_attribute: bool = False) -> str:
        """ "{namespace}name"."""
        prefix, colon, local = name.rpartition(":")
        space = "" if is_attribute and not colon else prefixes.get(prefix, "")
        return f"{{{space}}}{local}"


def _end_of_tag(content: bytes, start: int) -> int:
    """The offset after the tag's ">"; quoted values may contain ">", too."""
    found = re.compile(rb"""<(?:[^>"']|"[^"]*"|'[^']*')*>""").match(content, start)
    assert found is not None, "the parser has found a tag here"
    return found.end()


def _holders(root: Element) -> list[Element]:
    """The elements that hold properties: the descriptions directly within rdf:RDF."""
    return [
        child
        for element in root.all()
        if element.name == f"{{{RDF}}}RDF"
        for child in element.children
        if child.name == f"{{{RDF}}}Description"
    ]


def _full_name(wanted: Property) -> str:
    return f"{{{wanted[0]}}}{wanted[2]}"


def _text(holder: Element, wanted: Property) -> str:
    name = _full_name(wanted)
    if text := holder.attributes.get(name, "").strip():
        return text
    for child in holder.children:
        if child.name == name:
            items = {item.attributes.get(f"{{{XML}}}lang", ""): item.text for item in child.all() if _is_item(item)}
            return " ".join(items.get(DEFAULT, next(iter(items.values()), child.text)).split())
    return ""


def _is_item(element: Element) -> bool:
    return element.name == f"{{{RDF}}}li"


# ---- changing ----


def _with_text(content: bytes, wanted: Property, text: str, name: str) -> bytes:
    root = _parsed(content, name)
    holders = _holders(root)
    full = _full_name(wanted)
    for holder in holders:
        if full in holder.attributes:
            return _with_text(_without_attribute(content, holder, wanted), wanted, text, name)
    for holder in holders:
        for child in holder.children:
            if child.name == full:
                return _replaced(content, child, wanted, text)
    if holders:
        return _inserted(content, holders[0], _property(wanted, text, holders[0].prefixes))
    rdf_element = next(element for element in root.all() if element.name == f"{{{RDF}}}RDF")
    inner = _property(wanted, text, {**rdf_element.prefixes, "rdf": RDF})
    declared = "" if rdf_element.prefixes.get("rdf") == RDF else f' xmlns:rdf="{RDF}"'
    new = f'<rdf:Description{declared} rdf:about="">{inner}</rdf:Description>'
    return _inserted(content, rdf_element, new)


def _replaced(content: bytes, element: Element, wanted: Property, text: str) -> bytes:
    """Replaces the text of the default language; those of other languages stay."""
    alternatives = next((child for child in element.children if child.name == f"{{{RDF}}}Alt"), None)
    if alternatives is None:
        return _spliced(content, element.start, element.end, _property(wanted, text, element.prefixes))
    for item in alternatives.children:
        if _is_item(item) and item.attributes.get(f"{{{XML}}}lang") == DEFAULT:
            return _spliced(content, item.start, item.end, _item(text, item.prefixes))
    if alternatives.inner == alternatives.end:  # <rdf:Alt/>
        return _spliced(content, element.start, element.end, _property(wanted, text, element.prefixes))
    return _spliced(content, alternatives.inner, alternatives.inner, _item(text, alternatives.prefixes))


def _without_attribute(content: bytes, holder: Element, wanted: Property) -> bytes:
    names = {f"{prefix}:{wanted[2]}".encode() for prefix, space in holder.prefixes.items() if space == wanted[0]}

    def kept(attribute: re.Match[bytes]) -> bytes:
        return b"" if attribute[1] in names else attribute[0]

    tag = ATTRIBUTE.sub(kept, content[holder.start : holder.inner])
    return content[: holder.start] + tag + content[holder.inner :]


def _inserted(content: bytes, holder: Element, new: str) -> bytes:
    """Inserts the new element as the last child."""
    if holder.inner != holder.end:
        return _spliced(content, holder.outer, holder.outer, f"{new}\n")
    tag = re.match(rb"<([^\s/>]+)", content[holder.start : holder.inner])
    assert tag is not None
    return _spliced(content, holder.inner - 2, holder.inner, f">\n{new}\n</{tag[1].decode()}>")


def _spliced(content: bytes, start: int, end: int, new: str) -> bytes:
    return content[:start] + new.encode("utf-8") + content[end:]


def _property(wanted: Property, text: str, prefixes: Mapping[str, str]) -> str:
    space, prefix, local = wanted
    declared = "" if prefixes.get(prefix) == space else f' xmlns:{prefix}="{space}"'
    rdf = "" if prefixes.get("rdf") == RDF else f' xmlns:rdf="{RDF}"'
    item = _item(text, {"rdf": RDF})
    return f"<{prefix}:{local}{declared}{rdf}><rdf:Alt>{item}</rdf:Alt></{prefix}:{local}>"


def _item(text: str, prefixes: Mapping[str, str]) -> str:
    rdf = "" if prefixes.get("rdf") == RDF else f' xmlns:rdf="{RDF}"'
    return f'<rdf:li{rdf} xml:lang="{DEFAULT}">{escape(_valid(text))}</rdf:li>'


def _valid(text: str) -> str:
    """The text without characters that XML does not allow."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
