"""Compile the C kernels when the package is built or installed; without a compiler it works as well, but slower."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("blip2", "native", "build.py")


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        library = runpy.run_path(str(Path(self.root) / BUILD))["build"]()
        if library is not None and self.target_name == "wheel":
            build_data["artifacts"].append("/blip2/native/kernels.so")
            build_data["pure_python"] = False
            build_data["tag"] = _tag()


def _tag() -> str:
    """For any Python 3, on machines like this one."""
    from packaging.tags import sys_tags

    return f"py3-none-{next(sys_tags()).platform}"
