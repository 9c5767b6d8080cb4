"""HTML pages of images with texts: of a first batch, and of samples during a training."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from blip2.collection.page import image_html, page
from blip2.data import Row

THUMBNAIL_PX = 240
STYLE = """
body { max-width: 76rem; margin: 0 auto; padding: 1rem; }
header p, small { color: var(--dim); font-size: .875rem; margin: 0; }
main { display: grid; gap: .75rem; margin-top: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  overflow-wrap: anywhere; }
img { display: block; max-width: 100%; max-height: 12rem; margin: 0 auto .5rem; }
p { margin: .25rem 0; }
.read { color: var(--dim); }
.wrong { color: var(--bad); }
"""


def sheet(title: str, about: Iterable[str], cards: Iterable[tuple[Row, str]]) -> str:
    """HTML of a page. ``about``: lines of text; ``cards``: rows, and HTML to show below their images."""
    body = "\n".join(f"<p>{escape(line)}</p>" for line in about)
    shown = "\n".join(_card(row, text) for row, text in cards)
    title = escape(title)
    return page(title, STYLE, f"<header><h1>{title}</h1>\n{body}</header>\n<main>\n{shown}\n</main>")


def _card(row: Row, text: str) -> str:
    shown = image_html(row.content or row.image, THUMBNAIL_PX)
    return f"<figure>{shown}{text}<small>{escape(Path(row.image).name)}</small></figure>"
