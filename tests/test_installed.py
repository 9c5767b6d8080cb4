"""The line that installs more of the package: from a checkout, from a wheel, from an address, or by what it needs."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from blip2 import installed
from blip2.installed import install_line

REQUIRES = [
    "torch>=2.6",
    "fastapi>=0.115; extra == 'serve'",
    'uvloop>=0.21; (sys_platform != "win32") and extra == "serve"',
    "blip2[serve]; extra == 'ray'",
    "ray[serve]>=2.60; extra == 'ray'",
]


class Distribution:
    """What pip noted of an installation."""

    def __init__(self, told: dict[str, object] | None) -> None:
        self.told = told

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.told is None else json.dumps(self.told)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if the package did not lie in a checkout; a folder to install from."""
    monkeypatch.setattr(installed, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setattr(installed.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path


def test_from_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setattr(installed.util, "find_spec", lambda name: object())
    assert install_line("serve") == f"pip install -e '{root}[serve]'"
    assert install_line() == f"pip install -e {root}"
    monkeypatch.setattr(installed.util, "find_spec", lambda name: None)
    assert install_line().startswith("uv pip install -e ")


def test_from_elsewhere(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = away / "a folder" / "blip2-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()

    def line(told: dict[str, object] | None, extra: str | None = "serve") -> str:
        monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(told))
        return install_line(extra)

    assert line({"url": wheel.as_uri(), "archive_info": {}}) == f"pip install '{wheel}[serve]'"
    assert line({"url": away.as_uri(), "dir_info": {}}, None) == f"pip install {away}"
    address = "https://example.org/blip2.whl"
    assert line({"url": address, "archive_info": {}}) == f"pip install 'blip2[serve] @ {address}'"
    repository = {"url": "https://example.org/blip2", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert line(repository, "ray") == "pip install 'blip2[ray] @ git+https://example.org/blip2@abc'"
    needs = "'fastapi>=0.115' 'uvloop>=0.21; sys_platform != \"win32\"'"
    for gone in (None, {"url": "file:///no/such.whl", "archive_info": {}}):
        assert line(gone) == f"pip install {needs}"
        assert line(gone, "ray") == f"pip install 'fastapi>=0.115' 'ray[serve]>=2.60' {needs.partition(' ')[2]}"
