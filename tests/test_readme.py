"""What the README shows works as it stands, with the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blip2 import __version__
from blip2.cli import COMMANDS
from blip2.train import load_recipe
from tests import documents

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    documents.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("code", documents.blocks(README, "python"))
def test_the_python_runs(code: str, folder: Path) -> None:
    documents.run_python(code, "README.md")


def test_the_commands_print_what_is_shown(folder: Path) -> None:
    """In order, in one folder: what a command writes, later ones read. The training is the guide's, of a few steps."""
    guide = (ROOT / "docs/guides/train.md").read_text("utf-8")
    assert documents.write_recipes(guide) == ["stage1.toml", "stage2.toml"]
    found = documents.commands(README)
    assert len(found) >= 8
    for command in found:
        documents.check(command, documents.run(command), folder)
    assert (folder / "runs/stage2/config.json").exists() and (folder / "scores").is_dir()


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_verb_that_is_shown_exists() -> None:
    verbs = set(re.findall(r"(?m)(?:^\$ |^|; |: |&& )blip2 (\w+)", README))
    assert {"caption", "ask", "match", "index", "search", "train", "serve", "quantize"} <= verbs <= {*COMMANDS}


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_recipes_are_read(recipe: Path) -> None:
    """The name of the first two says which stage they are of; others may be of either."""
    stage = load_recipe(recipe).stage
    assert stage == int(recipe.stem[-1]) if recipe.stem.startswith("stage") else stage in (1, 2)


def test_the_citation_is_of_the_latest_version() -> None:
    """And where this is a tagged commit, of that version: else it is not to be released."""
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    latest = re.search(r"^## \[(\d.*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1]
    assert cited["version"] == latest and "2301.12597" in cited["preferred-citation"]["url"]
    if "dev" not in __version__:
        assert latest == __version__


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_the_forms_of_issues_are_whole(form: Path) -> None:
    """What the place that shows them needs: else it shows an empty page."""
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(form.read_text("utf-8"))
    if form.stem == "config":
        return
    assert {"name", "description", "body"} <= {*content}
    fields = [each for each in content["body"] if each["type"] != "markdown"]
    assert fields and all(each["type"] in ("textarea", "input") and each["attributes"]["label"] for each in fields)
    assert len({each["id"] for each in fields}) == len(fields)
