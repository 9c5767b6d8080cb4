"""The other columns of a source (beside images and texts), carried from format to format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from blip2.collection.record import Result

ALWAYS_SAME = ("file_name", "path_bytes")


def plain(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON values: times and the like as text, non-finite numbers as None; bytes are left out."""
    return {name: _plain(value) for name, value in columns.items() if not isinstance(value, bytes | bytearray)}


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int():
            return value
        case str():
            return as_text(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return plain({str(name): inner for name, inner in value.items()})
        case list() | tuple():
            return [_plain(inner) for inner in value if not isinstance(inner, bytes | bytearray)]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def as_text(value: str) -> str:
    """The text with U+FFFD for invalid Unicode: names that are not UTF-8, and lone surrogates."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", value)


class Carried:
    """The columns of all results, each with one type: int, float, bool, str, or json for everything else."""

    def __init__(self, results: Iterable[Result], own: Iterable[str] = (), same: Iterable[str] = ()) -> None:
        """``own``: names of the output's own columns; a source column of that name becomes NAME_original, and replaces
        an earlier NAME_original. ``same``: columns that repeat the content of the output's own; they are dropped."""
        kinds: dict[str, str] = {}
        for result in results:
            for name, value in result.columns.items():
                kinds[name] = _joined(kinds.get(name, ""), _kind(value))
        own, skipped_files = {*own}, {*same, *ALWAYS_SAME}
        given = {name: f"{name}_original" if name in own else name for name in kinds if name not in skipped_files}
        new = {new for name, new in given.items() if new != name}
        self._sources = {
            new_name: name
            for name, new_name in given.items()
            if new_name not in own and (new_name != name or name not in new)
        }
        self.kinds = {new_name: kinds[name] or "str" for new_name, name in self._sources.items()}

    def of(self, result: Result) -> dict[str, Any]:
        """The same names for every result; None if a result has no such column."""
        return {given: _as(self.kinds[given], result.columns.get(source)) for given, source in self._sources.items()}


def _kind(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "bool"
        case int():
            return "int" if -(2**63) <= value < 2**63 else "str"
        case float() | str():
            return type(value).__name__
    return "json"


def _joined(one: str, other: str) -> str:
    if not one or not other or one == other:
        return one or other
    return "float" if {one, other} == {"int", "float"} else "json" if "json" in (one, other) else "str"


def _as(kind: str, value: Any) -> Any:
    if value is None:
        return None
    if kind == "float":
        return float(value)
    if kind == "json" or (kind == "str" and not isinstance(value, str)):
        return json.dumps(value, ensure_ascii=False)
    return value
