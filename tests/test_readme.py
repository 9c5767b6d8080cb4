"""What the README shows works as it stands, with the bundled model."""

from __future__ import annotations

import re
import shlex
import shutil
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


def commands() -> list[tuple[str, str]]:
    """Each command that is shown with what it prints, and that; "" where nothing is shown."""
    found = []
    for block in blocks("console"):
        for shown in block.removeprefix("$ ").split("\n$ "):
            command, _, output = shown.partition("\n")
            if re.match(r"(printf .*\| )?blip2 (caption|ask|chat|match|index|search|explain) ", command):
                found.append((command, output.strip("\n")))
    return found


def test_the_commands_print_what_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In order, in one folder: what a command writes, later ones read. Places and last digits may differ."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    tried = 0
    for command, shown in commands():
        questions, _, verb = command.rpartition("blip2 ")
        arguments = shlex.split(verb, comments=True)
        if not (shown or arguments[0] == "index") or "photos/" in verb:
            continue
        given = questions.removeprefix("printf '").removesuffix("' | ").replace("\\n", "\n")
        done = CliRunner().invoke(cli, arguments, input=given)
        assert done.exit_code == 0, (command, done.output)
        printed = done.output.strip("\n").replace(str(tmp_path), "/home/you/blip2").splitlines()
        for line, expected in zip(printed, shown.splitlines(), strict=True) if shown else ():
            number = re.compile(r"-?\d+\.\d+")
            assert number.sub("#", line) == number.sub("#", expected), command
            assert [float(n) for n in number.findall(line)] == pytest.approx(
                [float(n) for n in number.findall(expected)], abs=0.02
            ), command
        tried += 1
    assert tried >= 12


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
