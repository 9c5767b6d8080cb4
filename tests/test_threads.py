"""A model computes with as many threads as its size is worth, or as many as were asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import blip2
from blip2 import threads
from blip2.generation import batch
from blip2.vision import VisionTransformer


@pytest.fixture
def four_threads(monkeypatch):
    """As on a machine of four processors whose user asked for nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_a_thread_for_so_many_weights():
    with torch.device("meta"):
        assert threads.num_useful(nn.Linear(8, 8)) == 1
        assert threads.num_useful(nn.Linear(threads.WEIGHTS_A_THREAD // 8, 24)) == 4


def test_it_is_as_before_afterwards(four_threads):
    with threads.at_most(2):
        assert torch.get_num_threads() == 2
        with threads.at_most(3):
            assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), threads.at_most(1):
        raise KeyError
    assert torch.get_num_threads() == 4


def test_a_number_that_was_asked_for_stays(four_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads.at_most(1):
        assert torch.get_num_threads() == 4


def test_the_miniature_works_alone(four_threads, monkeypatch):
    """Both its halves: the image encoder and the decoding."""
    seen = set()

    def noting(where: type, name: str) -> None:
        inner = getattr(where, name)

        def noted(*given):
            seen.add((name, torch.get_num_threads()))
            return inner(*given)

        monkeypatch.setattr(where, name, noted)

    for where, name in ((VisionTransformer, "forward"), (batch.Batch, "step")):
        noting(where, name)
    blip2.load().caption("examples/picture.png")
    assert seen == {("forward", 1), ("step", 1)}
    assert torch.get_num_threads() == 4


def run(program: str, *arguments: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_waiting_threads_do_not_keep_a_processor_busy():
    program = "import blip2, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(program) == "200"
    assert run(program, GOMP_SPINCOUNT="7") == "7"
    assert run(program, OMP_WAIT_POLICY="active") == "None"


def test_every_verb_takes_threads():
    program = (
        "import sys, torch\n"
        "from blip2.cli import COMMANDS, Cli, cli\n"
        "assert all('--threads' in {flag for each in cli.get_command(None, verb).params for flag in each.opts} "
        "for verb in COMMANDS)\n"
        "from blip2.generation import batch\n"
        "inner = batch.Batch.step\n"
        "batch.Batch.step = lambda self: print(torch.get_num_threads()) or inner(self)\n"
        "cli(['caption', 'examples/picture.png', '--threads', '3', '--max-new-tokens', '1'])"
    )
    assert run(program).splitlines()[0] == "3"
