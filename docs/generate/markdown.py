"""Docstrings and help texts to Markdown, and the fields of dataclasses with the text below them."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

CODE = re.compile(r"``.+?``|`[^`]+`|(?<![\w-])--?[a-zA-Z0][\w-]*(?<!-)", re.S)
"""Marked as such, or an option of a command."""


class Field(NamedTuple):
    """A field of a dataclass, as its source has it; ``default`` is "" where there is none."""

    name: str
    type: str
    default: str
    text: str


def fields_of(kind: type) -> Iterator[Field]:
    """Those of one dataclass, in order; the text is the string below each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for number, node in enumerate(body.body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        below = body.body[number + 1] if number + 1 < len(body.body) else None
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        text = inspect.cleandoc(str(below.value.value)) if is_text else ""  # type: ignore[union-attr]
        default = ast.unparse(node.value) if node.value is not None else ""
        made = re.fullmatch(r"field\(default_factory=(\w+)\)", default)
        yield Field(node.target.id, ast.unparse(node.annotation), f"{made[1]}()" if made else default, text)


def prose(text: str) -> str:
    """A docstring: ``code`` becomes `code`; signs that Markdown would take for marks are escaped outside of code."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts += [_escaped(text[end : found.start()]), _code(found[0])]
        end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def _code(marked: str) -> str:
    return "`" + " ".join(marked.strip("`").split()) + "`"


def _escaped(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        is_code = line.startswith("    ")  # an example that is set in
        lines.append(line if is_code else re.sub(r"([*<|_\[\]])", r"\\\1", line))
    return "\n".join(lines)


def paragraphs(text: str) -> str:
    r"""A click help text: paragraphs; those after ``\b`` keep their lines."""
    found = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            lines = paragraph.lstrip("\b\n").split("\n")
            is_shell = any(line.startswith(("blip2 ", "curl ", "find ", "torchrun ")) for line in lines)
            found.append("\n".join(["```sh" if is_shell else "```text", *lines, "```"]))
        else:
            found.append(prose(" ".join(paragraph.split())))
    return "\n\n".join(found)


def entry(term: str, text: str) -> str:
    """An item of a definition list."""
    lines = text.strip().split("\n") or [""]
    body = "\n".join([lines[0], *(f"  {line}" if line else "" for line in lines[1:])])
    return f"{term}\n: {body or '.'}\n"


def table(head: list[str], rows: list[list[str]], right: int = 1) -> str:
    """A table; the columns from ``right`` on stand at the right."""
    sides = ["---" if number < right else "---:" for number in range(len(head))]
    lines = [head, sides, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
