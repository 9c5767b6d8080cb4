"""Optional packages that formats need, imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from blip2.errors import CollectionError
from blip2.installed import install_line


def need(module: str, what: str) -> Any:
    """A module of the extra "data". Raises CollectionError with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise CollectionError(f"{what} needs {package}, which is not installed: {install_line('data')}") from None
