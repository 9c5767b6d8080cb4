"""What the README shows works as it stands, with the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from blip2.cli import cli
from blip2.train import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_python_runs(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the bundled model in the place of published ones, and the CPU in that of the GPU."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # what the code writes is written beside it
    monkeypatch.chdir(tmp_path)
    code = re.sub(r'"Salesforce/[^"]*"', '"miniature"', blocks("python")[number])
    code = code.replace('device="cuda", dtype="float16"', 'device="cpu", dtype="bfloat16"')
    exec(compile("import blip2\n" + code, "README.md", "exec"), {})


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_verb_that_is_shown_exists() -> None:
    verbs = set(re.findall(r"^\$ blip2 (\w+)", README, re.M))
    assert {"caption", "ask", "chat", "index", "search", "train", "info", "quantize", "convert", "doctor"} <= verbs
    for verb in verbs:
        assert CliRunner().invoke(cli, [verb, "--help"]).exit_code == 0


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_recipes_are_read(recipe: Path) -> None:
    assert load_recipe(recipe).stage == int(recipe.stem[-1])
