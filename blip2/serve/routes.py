"""A table of the routes: for the log, the metrics, and OPTIONS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

OTHER = "other"
"""The name of all unknown paths. The path itself is not logged: it may be a secret."""


class Routes:
    """``paths``: each route as in /openapi.json, with its methods: ``{"/v1/models/{name}": ["get"]}``."""

    def __init__(self, paths: Mapping[str, Iterable[str]]) -> None:
        self._methods = {path: _allowed(methods) for path, methods in paths.items()}
        self._patterns = [(re.compile(re.sub(r"\{\w+\}", ".+", path)), path) for path in paths if "{" in path]
        self.fixed = [path for path in paths if "{" not in path]
        """Routes without parameters."""

    def name(self, path: str) -> str:
        """The route of a path, or `OTHER`."""
        if path in self._methods and "{" not in path:
            return path
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), OTHER)

    def allowed(self, path: str) -> str | None:
        """The methods of a path for the Allow header; None for an unknown path."""
        return self._methods.get(self.name(path))


def _allowed(methods: Iterable[str]) -> str:
    found = {method.upper() for method in methods} | {"OPTIONS"}
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))
