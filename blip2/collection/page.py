"""The common part of pages opened from disk. Each is a single file and follows the reader's light or dark mode."""

from __future__ import annotations

import base64
from html import escape

from blip2.errors import ImageError
from blip2.image import Source, thumbnail

STYLE = """
:root { color-scheme: light dark; --back: #fafafa; --front: #1c1c1e; --dim: #63636a; --card: #fff; --line: #dcdce0;
  --bad: #b3261e; --mark: #8a5300; }
@media (prefers-color-scheme: dark) {
  :root { --back: #161618; --front: #ececf0; --dim: #a0a0a8; --card: #222225; --line: #3a3a3f; --bad: #ff8a80;
    --mark: #ffb951; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--front); font: 1rem/1.4 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.4rem; overflow-wrap: anywhere; }
"""


def page(title: str, style: str, body: str, *, head: str = "") -> str:
    """HTML of a whole page. ``title``, ``body`` and ``head`` (further elements of the head) are HTML. ``style`` is
    appended to `STYLE`."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style.lstrip()}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def image_html(source: Source, size_px: int) -> str:
    """HTML of an image embedded in the page, at most ``size_px`` wide and high; of an unreadable one, the error."""
    try:
        data = base64.b64encode(thumbnail(source, size_px)).decode()
    except ImageError as error:
        return f'<p class="wrong">{escape(str(error))}</p>'
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'
