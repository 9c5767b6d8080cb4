"""What the server offers, as a table: for the log, for metrics, and for who asks by OPTIONS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

OTHER = "other"
"""The name of whatever is no route of ours. What was asked there is not repeated: it may be a secret."""


class Routes:
    """``paths``: each route as /openapi.json writes it, with its methods: ``{"/v1/models/{name}": ["get"]}``."""

    def __init__(self, paths: Mapping[str, Iterable[str]]) -> None:
        self._methods = {path: _allowed(methods) for path, methods in paths.items()}
        self._patterns = [(re.compile(re.sub(r"\{\w+\}", ".+", path)), path) for path in paths if "{" in path]
        self.fixed = [path for path in paths if "{" not in path]
        """The routes that are one path each."""

    def name(self, path: str) -> str:
        """The route that answers at a path, or `OTHER`."""
        if path in self._methods and "{" not in path:
            return path
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), OTHER)

    def allowed(self, path: str) -> str | None:
        """The methods of a path as the header Allow has them; None where there is no route."""
        return self._methods.get(self.name(path))


def _allowed(methods: Iterable[str]) -> str:
    found = {method.upper() for method in methods} | {"OPTIONS"}
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))
