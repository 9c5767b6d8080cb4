"""The reference of recipes: every key of `blip2.train.recipes.Recipe` and of the tables in it."""

from __future__ import annotations

import inspect
import typing
from dataclasses import is_dataclass

from blip2.train.recipes import Recipe
from docs.generate.markdown import entry, fields_of, prose


def tables(kind: type, name: str = "") -> dict[str, type]:
    """Each table of a recipe by its name in TOML, with its dataclass: "" for the recipe itself, "data", "data.mix"."""
    found = {name: kind}
    for key, hint in typing.get_type_hints(kind).items():
        for part in (hint, *typing.get_args(hint)):
            if is_dataclass(part) and isinstance(part, type) and part not in found.values():
                found |= tables(part, f"{name}.{key}".lstrip("."))
    return found


def page() -> str:
    parts = [
        "# Recipe keys",
        "A recipe of [`blip2 train`](cli/train.md) is a TOML file. These are all keys that it can have, generated from "
        "the dataclasses that read it; any other key is an error that names the nearest one. Paths are relative to the "
        "folder of the recipe. `--set NAME=VALUE` overrides a value, such as `--set optim.steps=100`.",
        "Two recipes with the values of the paper beside each key: [stage 1 and stage 2](examples.md).",
    ]
    for name, kind in tables(Recipe).items():
        parts.append(f"## [{name}]" if name else "## Top level")
        if (text := inspect.getdoc(kind)) and not text.startswith(f"{kind.__name__}("):
            parts.append(prose(text))
        for field in fields_of(kind):
            default = f" = {field.default}" if field.default else ""
            told = prose(field.text) or ("Required." if not default else f"Default: {field.default}.")
            parts.append(entry(f"`{field.name}: {field.type}{default}`", told))
    return "\n\n".join(parts) + "\n"
