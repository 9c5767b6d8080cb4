"""The images of a page of any kind, and the text around them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from html import unescape

from blip2.alt.image import Image
from blip2.alt.markdown import images_of_markdown
from blip2.alt.markup import images_of_html
from blip2.alt.pages import HTML, MDX, XML, Page
from blip2.alt.tags import INSERTION

AROUND_CHARS = 600
CONTEXT_CHARS = 90
HERE = "[…]"

NO_WORDS = re.compile(
    r"<(script|style|title)\b.*?</\1\s*>|<!--.*?-->|<[^<>]*>|^[^<>]*>|<[^<>]*$", re.DOTALL | re.IGNORECASE
)
LINKS = re.compile(r"!?\[([^\[\]]*)\](?:\((?:\\.|[^()\\])*\)|\[[^\[\]]*\])")
MARKS = re.compile(
    r"^[ \t]*(?:\[[^\]]+\]:.*|\|?[ \t]*:?-+:?[ \t:|-]*)$|^[ \t]*(?:#{1,6}|>|[-*+]|\d+[.)])[ \t]+|[*`|]+", re.MULTILINE
)


def images_in(page: Page) -> list[tuple[str, Image]]:
    """Images in order, each with an identifier that survives changes elsewhere in the page."""
    found = (
        images_of_html(page.text, is_xml=page.suffix in XML)
        if page.suffix in HTML
        else images_of_markdown(page.text, is_mdx=page.suffix in MDX)
    )
    return list(_named(found))


def _named(images: Iterator[Image]) -> Iterator[tuple[str, Image]]:
    seen = Counter[str]()
    for image in images:
        digest = hashlib.blake2b(image.identity.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        seen[digest] += 1
        yield f"at-{digest}-{seen[digest]}", image  # not like a number, so that spreadsheets do not convert it


def context_of(page: Page, image: Image) -> str:
    """The words before and after an image, with `HERE` in its place."""
    before = _words(page.text[max(image.start - AROUND_CHARS, 0) : image.start])
    after = _words(page.text[image.stop : image.stop + AROUND_CHARS])
    if len(before) > CONTEXT_CHARS:
        before = before[-CONTEXT_CHARS:].partition(" ")[2]
    if len(after) > CONTEXT_CHARS:
        after = after[:CONTEXT_CHARS].rpartition(" ")[0]
    return " ".join(filter(None, [before, HERE, after]))


def _words(markup: str) -> str:
    text = LINKS.sub(r" \1 ", INSERTION.sub(" ", markup))
    text = MARKS.sub(" ", NO_WORDS.sub(" ", text))
    text = unescape(text).encode("utf-8", "replace").decode("utf-8")
    return " ".join(text.split())
