"""What building the package does besides packing it: compiles the C kernels, and writes down what it was built of.

Without a compiler, and with ``BLIP2_KERNELS=no``, the wheel is for every machine, and slower.
"""

from __future__ import annotations

import json
import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("blip2", "native", "build.py")
VERSION = Path("blip2", "version.py")


class ReleaseHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":  # a checkout asks git, whenever it is asked
            self._tell_version(build_data)
        if self.target_name == "wheel" and os.environ.get("BLIP2_KERNELS") != "no":
            self._compile(build_data)

    def _tell_version(self, build_data: dict[str, Any]) -> None:
        told = runpy.run_path(str(Path(self.root) / VERSION))
        if told["BUILT"].exists():  # this is an sdist, which has it
            return
        self._folder = tempfile.TemporaryDirectory()  # which goes when the hook does
        path = Path(self._folder.name, "built.json")
        path.write_text(json.dumps({"version": told["__version__"], "commit": told["COMMIT"]}) + "\n", "utf-8")
        build_data["force_include"][str(path)] = "blip2/built.json"

    def _compile(self, build_data: dict[str, Any]) -> None:
        if runpy.run_path(str(Path(self.root) / BUILD))["build"]() is not None:
            build_data["artifacts"].append("/blip2/native/kernels.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"  # for any Python: the library knows nothing of it


def _platform() -> str:
    """Such as linux_x86_64, which ``auditwheel`` then makes more exact, or macosx_11_0_arm64."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
