"""Pages that show files of the repository outside docs/, and the list of guides."""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = {
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
} | {
    path.relative_to(ROOT).as_posix(): "-".join(path.relative_to(ROOT).parts).lower().replace("-readme", "")
    for path in sorted(ROOT.glob("miniature/**/*.md"))
    if not {"work", "results.md"} & {*path.relative_to(ROOT).parts}
}  # fmt: skip
"""Files that are pages of the site as well, by their names there, in the folder of generated pages."""
EXAMPLES = {
    "Recipes": "examples/recipes/*.toml",
    "Clients of the server": "examples/clients/*",
    "Fine-tuning with the names of transformers": "examples/drop_in.py",
}
LANGUAGES = {".toml": "toml", ".py": "python", ".mjs": "javascript"}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#|<)([^)#\s]+)(#[^)\s]*)?(?=\))")
GENERATED = "docs/generated"
OTHER_PLACES = {"README.md": "docs/index.md", "examples/recipes": f"{GENERATED}/examples.md",
                "examples/clients": f"{GENERATED}/examples.md", "docs": "docs/index.md"}  # fmt: skip


def pages() -> dict[str, str]:
    """Those of `SHOWN`, with links that lead to the same places from where they stand in the site."""
    found = {}
    for name, page in SHOWN.items():
        path = ROOT / name
        if path.exists():
            found[page] = relinked(path.read_text("utf-8"), name, f"{GENERATED}/{page}")
    return found


def relinked(text: str, here: str, page: str) -> str:
    """Links of a Markdown file, from its place in the repository, to what the site has; ``page``: where it will be.

    What the site has not is named as code, with its path in the repository.
    """

    def led(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[1]))
        target = f"{GENERATED}/{SHOWN[target]}" if target in SHOWN else OTHER_PLACES.get(target, target)
        return posixpath.relpath(target, posixpath.dirname(page)) + (found[2] or "")

    def parted(part: str) -> str:
        part = LINK.sub(led, part)
        return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#]+)(#[^)]*)?\)", lambda link: _or_code(link, page), part)

    # Marks of code are kept out of the way, but a link's text may be code.
    held: list[str] = []

    def hold(found: re.Match[str]) -> str:
        held.append(found[0])
        return f"\x00{len(held) - 1}\x00"

    text = re.sub(r"```.*?```", hold, text, flags=re.S)
    text = parted(text)
    return re.sub("\x00(\\d+)\x00", lambda found: held[int(found[1])], text)


def _or_code(link: re.Match[str], page: str) -> str:
    target = link[2]
    if re.match(r"https?:|mailto:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if path.startswith("docs/") or ((ROOT / path).is_file() and not path.endswith(".md")):
        return link[0]
    return link[1] if "`" in link[1] else f"{link[1]} (`{path}`)"


def examples_page() -> str:
    parts = ["# Example files", "Files of the repository's folder `examples/`, as they are."]
    for title, pattern in EXAMPLES.items():
        parts.append(f"## {title}")
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix in LANGUAGES:
                name = path.relative_to(ROOT).as_posix()
                parts.append(f"### {name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text('utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"


@cache
def title_of(page: str) -> str:
    """The heading of a page, named from docs/; of a generated one, as it is generated."""
    from docs.generate import PAGES, command_line

    folder, _, name = page.partition("/")
    if folder != "generated":
        text = (DOCS / page).read_text("utf-8")
    elif name in PAGES:
        text = PAGES[name]()
    elif name in (made := pages()):
        text = made[name]
    else:
        text = command_line.pages()[name.removeprefix("cli/").removesuffix(".md")]
    return next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")


def guides_page() -> str:
    """Each guide by its title, with its first sentence: what is in the folder is in the list."""
    names = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / "guides").glob("*.md"))
    lines = []
    for name in (*names, "serving.md", "transformers.md", "language_models.md", "image_encoders.md"):
        lines.append(f"- [{title_of(name)}](../{name}). {_first_sentence((DOCS / name).read_text('utf-8'))}")
    return "# All guides\n\n" + "\n".join(lines) + "\n"


def _first_sentence(text: str) -> str:
    text = re.sub(r"^```.*?^```|^#.*?$|^!\[.*?$", "", text, flags=re.S | re.M)
    first = re.split(r"(?<=[.:])\s", " ".join(text.strip().partition("\n\n")[0].split()), maxsplit=1)[0]
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", first).rstrip(".:") + "."
