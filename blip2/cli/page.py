"""An HTML page of search results: a single file with embedded thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import click

from blip2.errors import ImageError

THUMBNAIL_PX = 320

STYLE = """
body { padding: 1rem; }
p, h2 { margin: 0 0 1rem; color: var(--dim); font-size: .9rem; font-weight: normal; }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 100%), 1fr)); gap: .75rem;
  margin-bottom: 2rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure a { display: block; aspect-ratio: 1; }
img { display: block; width: 100%; height: 100%; object-fit: contain; }
.gone { display: grid; place-items: center; aspect-ratio: 1; color: var(--dim); font-size: .9rem; }
figcaption { padding: .5rem .6rem; font-size: .8rem; overflow-wrap: anywhere; border-top: 1px solid var(--line); }
figcaption b { display: block; font-variant-numeric: tabular-nums; }
figcaption span { color: var(--dim); }
"""


class Shown(NamedTuple):
    """A result: an image and its columns, the score first."""

    path: str
    values: dict[str, Any]

    @property
    def columns(self) -> list[str]:
        """The score, and the group that it belongs to if there are groups."""
        return [f"{self.values['score']:.4f}"] + [str(self.values[name]) for name in ("group",) if name in self.values]


def page(title: str, groups: Sequence[Sequence[Shown]], tell: Callable[[str], None]) -> str:
    """HTML of images in groups. ``tell`` gets one line for each image that cannot be opened; its name is shown."""
    from blip2.collection.page import page as whole_page  # imports Pillow

    # Replace what cannot be encoded: a name that is not UTF-8, a text with a lone surrogate.
    title = click.format_filename(title)
    number = sum(map(len, groups))
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{number:,} image{'' if number == 1 else 's'}</p>"]
    for place, group in enumerate(groups, start=1):
        if len(groups) > 1:
            parts.append(f"<h2>group {place}, {len(group)} images</h2>")
        parts += ["<section>", *(_figure(shown, tell) for shown in group), "</section>"]
    return whole_page(f"{escape(title)} - blip2 search", STYLE, "\n".join(parts))


def _figure(shown: Shown, tell: Callable[[str], None]) -> str:
    from blip2.image import thumbnail  # imports torch

    path = Path(shown.path)
    name, folder = (click.format_filename(str(part)) for part in (path.name, path.parent))
    try:
        data = base64.b64encode(thumbnail(path, THUMBNAIL_PX)).decode("ascii")
    except ImageError as error:
        tell(str(error))
        image = '<div class="gone">cannot be opened</div>'
    else:
        image = (
            f'<a href="{escape(path.as_uri())}"><img src="data:image/jpeg;base64,{data}" alt="{escape(name)}" '
            'loading="lazy"></a>'
        )
    score = f"{shown.values['score']:.4f}"
    return (
        f"<figure>{image}<figcaption><b>{score}</b>{escape(name)} <span>{escape(folder)}</span></figcaption></figure>"
    )
