"""The command, run within the test's own process."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from blip2.cli import cli


@pytest.fixture
def run():
    """``run("caption", path, input=...)``: exit code, stdout and stderr of the command."""

    def run_it(*arguments, **extra):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], **extra)

    return run_it


@pytest.fixture(scope="session")
def model(opt_model):
    """The options that name the tiny model and keep its texts short."""
    return ["--model", opt_model, "--max-new-tokens", "6"]
