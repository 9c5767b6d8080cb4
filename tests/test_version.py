"""Which version a tree is: of git's tags, of what a build wrote down, of an archive, or of nothing."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import blip2
from blip2 import version

UNKNOWN = version.UNKNOWN

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ("v1.2.0-0-g9e1a752", ("1.2.0", "9e1a752")),
        ("v1.2.0-3-g9e1a752", ("1.2.1.dev3+g9e1a752", "9e1a752")),
        ("v1.2.0-0-g9e1a752-dirty", ("1.2.1.dev0+g9e1a752.dirty", "9e1a752")),
        ("v1.9-12-g9e1a752", ("1.10.dev12+g9e1a752", "9e1a752")),
        ("v1.2.0rc1-3-g9e1a752", ("1.2.0rc2.dev3+g9e1a752", "9e1a752")),
        ("v1.2.0", ("1.2.0", None)),
        ("9e1a752", (f"{UNKNOWN}+g9e1a752", "9e1a752")),
        ("9e1a752-dirty", (f"{UNKNOWN}+g9e1a752.dirty", "9e1a752")),
    ],
)
def test_what_git_says_is_a_version(described, expected) -> None:
    assert version.of(described) == expected


def test_versions_are_in_the_order_of_their_commits() -> None:
    packaging = pytest.importorskip("packaging.version")
    described = ["9e1a752", "v1.2.0rc1-0-ga", "v1.2.0rc1-2-gb", "v1.2.0-0-gc", "v1.2.0-3-gd", "v1.2.1-0-ge"]
    versions = [packaging.Version(version.of(each).version) for each in described]
    assert versions == sorted(versions) and len(set(versions)) == len(versions)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with this package's version.py and nothing else."""
    (tmp_path / "blip2").mkdir()
    shutil.copy(version.__file__, tmp_path / "blip2/version.py")
    (tmp_path / ".gitattributes").write_text((version.ROOT / ".gitattributes").read_text())
    return tmp_path


def told(tree: Path) -> tuple[str, str | None]:
    program = "import runpy; told = runpy.run_path('blip2/version.py'); print(told['__version__'], told['COMMIT'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, check=True)
    number, commit = done.stdout.split()
    return number, None if commit == "None" else commit


def git(tree: Path, *arguments: str) -> str:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=tree, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_tree_without_git(tree: Path) -> None:
    assert told(tree) == (UNKNOWN, None)


def test_a_tree_that_was_built(tree: Path) -> None:
    (tree / "blip2/built.json").write_text(json.dumps({"version": "3.2.1", "commit": "abcdef0"}))
    assert told(tree) == ("3.2.1", "abcdef0")


@needs_git
def test_a_checkout(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    first = git(tree, "rev-parse", "--short", "HEAD")
    assert told(tree) == (f"{UNKNOWN}+g{first}", first)
    git(tree, "tag", "v1.2.0")
    git(tree, "tag", "something-else")
    assert told(tree) == ("1.2.0", first)
    (tree / "new").write_text("not known to git")
    assert told(tree) == ("1.2.0", first)
    with (tree / ".gitattributes").open("a") as file:
        file.write("# changed\n")
    assert told(tree) == (f"1.2.1.dev0+g{first}.dirty", first)
    git(tree, "commit", "-qam", "two")
    second = git(tree, "rev-parse", "--short", "HEAD")
    assert told(tree) == (f"1.2.1.dev1+g{second}", second)


@needs_git
def test_a_folder_in_the_repository_of_others(tree: Path) -> None:
    """As a package that lies in a virtual environment of somebody's checkout: their tags are not its version."""
    inner = tree / "site-packages"
    inner.mkdir()
    shutil.move(tree / "blip2", inner / "blip2")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    git(tree, "tag", "v9.9.9")
    assert told(inner) == (UNKNOWN, None)


@needs_git
@pytest.mark.parametrize("tag", ["v1.2.0", None])
def test_an_archive(tree: Path, tmp_path_factory: pytest.TempPathFactory, tag: str | None) -> None:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    if tag:
        git(tree, "tag", tag)
    commit = git(tree, "rev-parse", "--short", "HEAD")
    out = tmp_path_factory.mktemp("archive")
    git(tree, "archive", "--format=zip", "-o", str(out / "archive.zip"), "HEAD")
    shutil.unpack_archive(out / "archive.zip", out)
    if "describe" in (out / "blip2/version.py").read_text().partition("ARCHIVED = ")[2].partition("\n")[0]:
        pytest.skip("this git knows no %(describe)")
    assert told(out) == ("1.2.0" if tag else f"{UNKNOWN}+g{commit}", commit)


def test_the_version_is_found_where_it_is_expected() -> None:
    assert blip2.__version__ == version.__version__
    assert re.match(r"\d+\.\d+", blip2.__version__)


def test_what_a_report_of_a_defect_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(version, "COMMIT", "9e1a752")
    monkeypatch.setattr(version, "KERNELS", tmp_path)
    first, second = version.report().splitlines()
    assert first == f"blip2 {version.__version__}"
    assert second.startswith(f"commit 9e1a752, Python {platform.python_version()}, torch {metadata.version('torch')}, ")
    assert ", compiled kernels, " in second
    monkeypatch.setattr(version, "KERNELS", tmp_path / "none")
    monkeypatch.setattr(version, "COMMIT", None)

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "commit unknown" in version.report() and "no torch, no compiled kernels" in version.report()
