"""What Tab completes: verbs, options, choices and files, without anything heavy being imported for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip2.cli import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "PIL", "tokenizers", "numpy", "safetensors", "huggingface_hub", "rich", "transformers"}


def asked(words: str) -> tuple[list[str], set[str]]:
    """What the shell is told, and the packages that were imported for it."""
    variables = {"_BLIP2_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-X", "importtime", "-m", "blip2"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.split(), {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("blip2 ca", ["plain,caption"]),
        ("blip2 ", [f"plain,{name}" for name in COMMANDS]),
        ("blip2 --ver", ["plain,--version"]),
        ("blip2 caption --be", ["plain,--beams"]),
        ("blip2 caption --dtype fl", ["plain,float32", "plain,float16"]),
        ("blip2 caption hol", ["file,hol"]),  # the shell looks for files that begin so
        ("blip2 ask --model ", ["file,"]),
        ("blip2 train recipe", ["file,recipe"]),
        ("blip2 nothing-so", []),
        ("blip2 caption --nothing-so", []),
    ],
)
def test_words(words: str, expected: list[str]) -> None:
    answers, imported = asked(words)
    assert sorted(answers) == sorted(expected)
    assert "click" in imported and not imported & HEAVY


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_files_in_other_shells(shell: str) -> None:
    variables = {"_BLIP2_COMPLETE": f"{shell}_complete", "COMP_WORDS": "blip2 caption hol", "COMP_CWORD": "hol"}
    if shell == "zsh":
        variables["COMP_CWORD"] = "2"
    command = [sys.executable, "-m", "blip2"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(("file", "file,")) and "hol" in done.stdout


def test_a_verb_is_completed_without_its_file() -> None:
    assert not {name for name in asked("blip2 ")[1] if name.removeprefix("blip2.cli.") in COMMANDS}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip2"], env=os.environ | {"_BLIP2_COMPLETE": f"{shell}_source"},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert f"{shell}_complete" in done.stdout and "blip2" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_in_a_bash(tmp_path: Path) -> None:
    """As docs/guides/completion.md has it: the script is read, and Tab is pressed."""
    program = tmp_path / "blip2"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m blip2 "$@"\n')
    program.chmod(0o755)
    typed = 'eval "$(_BLIP2_COMPLETE=bash_source blip2)"; COMP_WORDS=(blip2 caption --bea); COMP_CWORD=2; '
    done = subprocess.run(
        ["bash", "-c", typed + '_blip2_completion blip2; echo "${COMPREPLY[@]}"'],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "--beams"
