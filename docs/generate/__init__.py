"""Pages of the site that are made from the code, at each build, so that they say what the code says.

    python -m docs.generate FOLDER

`PAGES`: the name of each file with what writes it. ``docs/conf.py`` calls `write` before Sphinx reads anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.generate import (
    benchmarks,
    command_line,
    http_api,
    models,
    python_api,
    questions,
    recipe_keys,
    repository,
)

PAGES: dict[str, Callable[[], str]] = {
    "python.md": python_api.page,
    "options.md": python_api.options_page,
    "transformers.md": python_api.transformers_page,
    "recipe.md": recipe_keys.page,
    "http.md": http_api.page,
    "models.md": models.page,
    "faq.md": questions.page,
    "figures.md": benchmarks.page,
    "examples.md": repository.examples_page,
    "guides.md": repository.guides_page,
    "command-line.md": command_line.overview,
}


def write(folder: Path) -> list[Path]:
    """Write every page into ``folder``; a file that holds the same already is left alone. Returns all of them."""
    pages = {name: make() for name, make in PAGES.items()}
    pages |= {f"cli/{name}.md": text for name, text in command_line.pages().items()}
    pages |= repository.pages()
    written = []
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
        written.append(path)
    for path in {*folder.rglob("*.md")} - {*written}:  # of a page that is not made any more
        path.unlink()
    return written
