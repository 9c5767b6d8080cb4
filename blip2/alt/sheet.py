"""The report with its images: a single HTML file, opened from disk."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from blip2.alt.report import Row
from blip2.alt.scan import HERE
from blip2.collection.page import page
from blip2.errors import ImageError

THUMBNAIL_PX = 320
MAX_PLACES = 5
GENERATOR = '<meta name="generator" content="blip2 alt">'
POLICY = "default-src 'none'; img-src data: http: https:; style-src 'unsafe-inline'"

STYLE = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
p { margin: 0; overflow-wrap: anywhere; }
header p, .dim { color: var(--dim); font-size: .875rem; }
header { margin-bottom: 1rem; }
article { display: grid; grid-template-columns: minmax(0, 12rem) minmax(0, 1fr); gap: 1rem; margin-bottom: .75rem;
  padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
@media (max-width: 30rem) { article { grid-template-columns: minmax(0, 1fr); } }
img { display: block; max-width: 100%; max-height: 12rem; margin: 0 auto; }
.gone { display: grid; place-items: center; min-height: 6rem; border: 1px dashed var(--line); color: var(--dim);
  font-size: .875rem; }
.text { font-size: 1.1rem; margin-bottom: .25rem; }
.wrong { color: var(--bad); }
ul { margin: .5rem 0 0; padding: 0; list-style: none; font-size: .875rem; overflow-wrap: anywhere; }
li { padding: .3rem 0; border-top: 1px solid var(--line); }
li span { display: block; color: var(--dim); }
mark { padding: 0 .2em; background: var(--line); color: inherit; border-radius: .2em; }
"""


def sheet(rows: Sequence[Row], images: Sequence[str], name: str) -> str:
    """Each image once, with its proposed text and its places. ``images``: the path or URL of each row, "" if there is
    none. ``name``: the file name of the table in which texts are approved."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row, image in zip(rows, images, strict=True):
        groups.setdefault((image or f"{row.file}:{row.line}", image, row.alt), []).append(row)
    number = len(rows)
    title = f"{number:,} image{'' if number == 1 else 's'} without alt text"
    parts = [_card(image, some) for (_, image, _), some in groups.items()]
    head = f'{GENERATOR}\n<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
    body = (
        f"<header><h1>{title}</h1>\n<p>Edit the texts in {escape(name)}, write yes (or decorative) in the column "
        f"“approved”, and run <code>blip2 alt --apply {escape(name)}</code>.</p></header>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>"
    )
    return page(f"{title} - blip2 alt", STYLE, body, head=head)


def _card(image: str, rows: Sequence[Row]) -> str:
    row = rows[0]
    if row.alt:
        words = f'<p class="text">{escape(row.alt)}</p>'
    else:
        words = '<p class="text dim">no text</p>'
    notes = [] if row.score is None else [f"score {row.score:.2f}"]
    notes += [f"approved: {row.approved}"] if row.approved else []
    notes.append(row.image)
    problem = f'<p class="wrong">{escape(row.problem)}</p>' if row.problem else ""
    places = [_place(one) for one in rows[:MAX_PLACES]]
    if len(rows) > MAX_PLACES:
        places.append(f"<li>and {len(rows) - MAX_PLACES:,} more places</li>")
    return (
        f'<article><div>{_shown(image, row.alt)}</div>\n<div>{words}<p class="dim">{escape(" · ".join(notes))}</p>'
        f"{problem}<ul>{''.join(places)}</ul></div></article>"
    )


def _place(row: Row) -> str:
    context = escape(row.context).replace(HERE, "<mark>image</mark>")
    old = f" · now “{escape(row.old)}”" if row.old else ""
    return f"<li>{escape(row.file)}:{row.line}{old}<span>{context}</span></li>"


def _shown(image: str, alt: str) -> str:
    from blip2.image import thumbnail  # imports torch

    text = f'alt="{escape(alt)}" loading="lazy"'
    if re.match("https?:", image, re.IGNORECASE):
        return f'<a href="{escape(image)}"><img src="{escape(image)}" {text} referrerpolicy="no-referrer"></a>'
    if not image:
        return '<div class="gone">no image</div>'
    try:
        data = base64.b64encode(thumbnail(image, THUMBNAIL_PX)).decode()
    except ImageError:
        return '<div class="gone">cannot be opened</div>'
    shown = f'<img src="data:image/jpeg;base64,{data}" {text}>'
    is_data = re.match("data:", image, re.IGNORECASE)
    return shown if is_data else f'<a href="{escape(Path(image).absolute().as_uri())}">{shown}</a>'
