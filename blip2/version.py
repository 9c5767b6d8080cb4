"""The version of the package and its commit. Also runs alone, for the build, see pyproject.toml.

The tag ``v1.2.0`` makes its commit version 1.2.0. Later commits are ``1.2.1.dev3+g9e1a752``: three commits after 1.2.0,
before the next version. A wheel and an sdist have a file with these facts; a checkout asks git; a git archive (GitHub's
"Download ZIP") has them filled in below. Without any of these the version is `UNKNOWN`.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILT = Path(__file__).with_name("built.json")
"""Written by `hatch_build.py` into wheels and sdists."""

KERNELS = Path(__file__).parent / "native" / "kernels.so"

ARCHIVED = "$Format:%(describe:tags=true,abbrev=12,match=v[0-9]*)|%h$"
"""Filled in by ``git archive``, see .gitattributes."""

FIRST = "0.1.0"
"""The coming version if there is no tag yet."""

UNKNOWN = f"{FIRST}.dev0"

LONG = re.compile(r"v(?P<tag>\d[\w.]*)(-(?P<distance>\d+)-g(?P<commit>[0-9a-f]+))?(?P<dirty>-dirty)?")


class Facts(NamedTuple):
    version: str
    commit: str | None


def facts() -> Facts:
    """The facts of this tree, from the first source that has them."""
    try:
        built = json.loads(BUILT.read_text("utf-8"))
        return Facts(built["version"], built["commit"])
    except FileNotFoundError:
        pass
    if (ROOT / ".git").exists() and (described := _described()):
        return of(described)
    described, _, commit = ARCHIVED.partition("|")
    if commit.endswith("$"):
        return Facts(UNKNOWN, None)
    return of(described or commit)._replace(commit=commit)


def report() -> str:
    """The version, and a line with facts for bug reports; imports nothing."""
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "no torch"
    kernels = "compiled kernels" if KERNELS.exists() else "no compiled kernels"
    built = f"commit {COMMIT or 'unknown'}, Python {platform.python_version()}, {torch}, {kernels}"
    return f"blip2 {__version__}\n{built}, {platform.system()} {platform.machine()}"


def of(described: str) -> Facts:
    """From the output of ``git describe --always``: v1.2.0, v1.2.0-3-g9e1a752, v1.2.0-3-g9e1a752-dirty, or only a
    commit."""
    found = LONG.fullmatch(described)
    if found is None:
        commit, _, dirty = described.partition("-")
        return Facts(f"{UNKNOWN}+g{commit}{'.dirty' if dirty else ''}", commit)
    distance, commit = int(found["distance"] or 0), found["commit"]
    if distance == 0 and not found["dirty"]:
        return Facts(found["tag"], commit)
    ahead = re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), found["tag"])  # 1.2.0 to 1.2.1, 1.2.0rc1 to 1.2.0rc2
    local = ".".join(filter(None, (commit and f"g{commit}", found["dirty"] and "dirty")))
    return Facts(f"{ahead}.dev{distance}+{local}", commit)


def _described() -> str | None:
    """The output of git; None without git, or if git refuses, as in a folder of another user."""
    command = ["git", "-C", str(ROOT), "describe", "--tags", "--long", "--dirty", "--always", "--match", "v[0-9]*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


__version__, COMMIT = facts()
