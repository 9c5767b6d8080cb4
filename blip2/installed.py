"""Where the package was installed from, and the command that installs its extras.

It is on no package index, so pip cannot find it by name: a checkout, a wheel or a URL has to be given.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "blip2"
CHECKOUT = Path(__file__).parents[1]


def install_line(extra: str | None = None) -> str:
    """The command that installs the package with an extra, such as "serve", from its origin.

    If the origin is gone, it names the packages of the extra instead.
    """
    pip = "pip install" if util.find_spec("pip") else "uv pip install"
    wanted = f"[{extra}]" if extra else ""
    if (CHECKOUT / "pyproject.toml").exists():
        return f"{pip} -e {_quoted(f'{CHECKOUT}{wanted}')}"
    if (origin := _origin()) is not None:
        named = f"{origin}{wanted}" if Path(origin).exists() else f"{NAME}{wanted} @ {origin}"
        return f"{pip} {_quoted(named)}"
    packages = sorted(_packages(extra)) if extra else [NAME]
    return f"{pip} {' '.join(map(_quoted, packages or [f'{NAME}{wanted}']))}"


def _origin() -> str | None:
    """A folder or a wheel that still exists, or a URL; None if unknown (PEP 610)."""
    try:
        direct = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
        url, repository = str(direct["url"]), direct.get("vcs_info")
    except (metadata.PackageNotFoundError, ValueError, LookupError):
        return None
    if repository:
        return f"{repository['vcs']}+{url}@{repository['commit_id']}"
    if urlsplit(url).scheme != "file":
        return url
    path = url2pathname(urlsplit(url).path)
    return path if Path(path).exists() else None


def _packages(extra: str) -> Iterator[str]:
    """The packages of an extra, from the metadata of the installed package; extras in it are resolved."""
    try:
        listed = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in listed:
        package, _, marker = requirement.partition(";")
        rest = re.sub(rf"""(\s*and\s*)?extra\s*==\s*["']{re.escape(extra)}["'](\s*and\s*)?""", "", marker).strip()
        if rest == marker.strip():
            continue
        if inner := re.match(rf"\s*{NAME}\[(\w+)\]", package):
            yield from _packages(inner[1])
        else:
            yield f"{package.strip()}; {rest.strip('() ')}" if rest.strip("() ") else package.strip()


def _quoted(argument: str) -> str:
    if sys.platform == "win32":  # its shells have no single quotes
        return f'"{argument}"' if re.search(r"[\s<>\[;]", argument) else argument
    return shlex.quote(argument)
