"""The reference of the interface for Python: signatures and docstrings of what ``import blip2`` offers."""

from __future__ import annotations

import inspect
import re
from typing import Any

import blip2
from docs.generate.markdown import entry, fields_of, prose

OWN = (
    "load", "Pipeline", "Matcher", "EncodedImage", "Index", "Explanation", "caption_collection", "ask_collection",
    "match_collection",
)  # fmt: skip
MODULES = {
    "blip2.train": ("load_recipe", "run"),
    "blip2.evaluate": ("evaluate",),
    "blip2.checkpoint": ("load_language",),
}
RESULTS = {
    "blip2.api.pipeline": ("Chat",),
    "blip2.tasks.match": ("Matches", "Match"),
    "blip2.index": ("Hit",),
    "blip2.collection.summary": ("Summary",),
}
"""What the methods give back, where its name is public in its module."""


def names_of_transformers() -> list[str]:
    """What `blip2` offers in the place of transformers' names."""
    others = {*OWN, "GenerateOptions", "Blip2Error", "__version__"}
    return [name for name in blip2.__all__ if name not in others]


def page() -> str:
    parts = [
        "# Python API",
        "Generated from the docstrings of the code. Decoding options are on a page of their own: "
        "[`GenerateOptions`](options.md). The drop-in classes for transformers are on [another](transformers.md).",
        "Axes in shapes: N images, M texts, Q query tokens (32 in the published models), D width, H height, W width.",
    ]
    parts += [described(f"blip2.{name}", getattr(blip2, name)) for name in OWN]
    parts.append("## Results")
    for module, names in RESULTS.items():
        found = _module(module)
        parts += [described(f"{module}.{name}", getattr(found, name), 3) for name in names if hasattr(found, name)]
    parts.append("## Training and evaluation")
    for module, names in MODULES.items():
        parts += [described(f"{module}.{name}", getattr(_module(module), name), 3) for name in names]
    parts += ["## Errors", _errors()]
    return "\n\n".join(parts) + "\n"


def options_page() -> str:
    from blip2.generation import GenerateOptions

    parts = [
        "# Decoding options",
        prose(inspect.getdoc(GenerateOptions) or ""),
        "The fields of `blip2.GenerateOptions`. "
        "Methods such as `Pipeline.caption` take each of them as a keyword; the command line has the same options with "
        "dashes (`--max-new-tokens`; `num_beams` is `--beams`). A value outside the range is an `OptionError`.",
    ]
    parts += [
        entry(f"`{field.name}: {field.type} = {field.default}`", prose(field.text))
        for field in fields_of(GenerateOptions)
    ]
    return "\n\n".join(parts) + "\n"


def transformers_page() -> str:
    parts = [
        "# Classes with the names of transformers",
        "What they take and refuse is in the guide [From transformers](../transformers.md).",
    ]
    parts += [described(f"blip2.{name}", getattr(blip2, name)) for name in names_of_transformers()]
    return "\n\n".join(parts) + "\n"


def described(name: str, what: Any, level: int = 2) -> str:
    """A heading, the signature, the docstring; of a class its public methods and properties, too."""
    mark = "#" * level
    parts = [f"{mark} {name}"]
    if inspect.isclass(what):
        if "__init__" not in vars(what) or not _is_frozen(what):
            parts.append(prose(inspect.getdoc(what) or ""))
        else:
            parts += [_signature(name, what), prose(inspect.getdoc(what) or "")]
        if _is_frozen(what):
            told = [field for field in fields_of(what) if field.text and not field.name.startswith("_")]
            parts += [entry(f"`{field.name}: {field.type}`", prose(field.text)) for field in told]
        for method, value in vars(what).items():
            if not method.startswith("_") and (told := _member(f"{name.rpartition('.')[2]}.{method}", value, mark)):
                parts.append(told)
    else:
        parts += [_signature(name, what), prose(inspect.getdoc(what) or "")]
    return "\n\n".join(part for part in parts if part)


def _member(name: str, value: Any, mark: str) -> str:
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    if inspect.isfunction(function):
        text = inspect.getdoc(function)
        return "\n\n".join([f"{mark}# {name}", _signature(name, function), prose(text or "")]) if text else ""
    if isinstance(value, property) or type(value).__name__ == "cached_property":
        return "\n\n".join([f"{mark}# {name}", "A property.", prose(inspect.getdoc(value) or "")])
    return ""


def _signature(name: str, what: Any) -> str:
    """As it stands in the source, a parameter a line where it is long."""
    found = inspect.signature(what)
    own = [each for each in found.parameters.values() if each.name not in ("self", "cls")]
    shown = [re.sub(r"<function .*?>", "...", str(each).replace("'", "")) for each in own]
    for number, each in enumerate(own):
        if isinstance(each.default, str):
            shown[number] = f"{str(each.replace(default=each.empty)).replace(chr(39), '')} = {each.default!r}"
    kinds = [each.kind for each in own]
    if each_first := next((n for n, kind in enumerate(kinds) if kind is inspect.Parameter.KEYWORD_ONLY), None):
        shown.insert(each_first, "*")
    elif kinds and kinds[0] is inspect.Parameter.KEYWORD_ONLY:
        shown.insert(0, "*")
    end = found.return_annotation
    gives = "" if end is inspect.Signature.empty else f" -> {str(getattr(end, '__name__', end)).strip(chr(39))}"
    line = f"{name}({', '.join(shown)}){gives}"
    if len(line) > 88:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){gives}"
    return f"```python\n{line}\n```"


def _is_frozen(kind: type) -> bool:
    return hasattr(kind, "__dataclass_fields__")


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _errors() -> str:
    from blip2 import errors

    found = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.Blip2Error)]
    told = "All derive from `blip2.Blip2Error`, which is a `ValueError`. The message is one line."
    return "\n\n".join(
        [
            told,
            *(
                entry(f"`blip2.errors.{kind.__name__}` ({kind.__base__.__name__})", prose(inspect.getdoc(kind) or ""))  # type: ignore[union-attr]
                for kind in found
            ),
        ]
    )
