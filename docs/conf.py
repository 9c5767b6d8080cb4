"""The site: `make docs`, then docs/_build/html/index.html. Nothing is fetched to build it, or to read it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import blip2  # noqa: E402
from docs.generate import repository, write  # noqa: E402

project = "blip2"
version = release = blip2.__version__
author = "The blip2 authors"
project_copyright = "The blip2 authors, MIT licence"
language = "en"

extensions = ["myst_parser"]
myst_enable_extensions = ["deflist", "attrs_block"]
myst_heading_anchors = 4
exclude_patterns = ["_build", "generate"]
smartquotes = False  # they make -- of options a dash
nitpicky = True  # with `make docs`, which makes warnings errors: no link leads nowhere
pygments_style = "default"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = f"blip2 {release}"
html_copy_source = html_show_sourcelink = False  # Markdown is beside the code already
html_use_index = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_search_scorer = str(HERE / "static/scorer.js")
html_theme_options = {"navigation_with_keys": True}

write(HERE / "generated")


def led_to_the_site(app: Any, page: str, content: list[str]) -> None:
    """Links to files outside docs/, such as SECURITY.md, lead to the pages that show them."""
    if not page.startswith("generated/"):
        here = f"docs/{page}.md"
        content[0] = repository.relinked(content[0], here, here)


def setup(app: Any) -> None:
    app.connect("source-read", led_to_the_site)
