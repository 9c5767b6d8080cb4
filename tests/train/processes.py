"""What one of several processes does in the tests: the gradients of a step of recipes, all that a group can, and a
training.

    python -m tests.train.processes out.pt '[{"path": "recipe.toml", "optim.accumulate": 2}, ...]' '{"path": ...}'
    python -m tests.train.processes silent        # the second does not answer
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from blip2.train.check import gather
from blip2.train.group import Group, Step, joined
from blip2.train.loop import autocast_for
from blip2.train.optim import sum_gradients, trained_parameters
from blip2.train.prepare import prepare
from blip2.train.recipes import load_recipe
from blip2.train.shard import shard
from blip2.train.start import build

ROOT = Path(__file__).parents[2]


def gradients(path, overrides, group=None, number=3, autocast=None):
    """The losses and the gradients of step ``number`` of a recipe, dropout included; in its precision by default."""
    group, recipe = group or Group(), load_recipe(path, overrides)
    autocast = autocast or autocast_for(recipe.precision, torch.device("cpu"))[0]
    torch.manual_seed(recipe.seed)
    with group.in_turn(f"{path} {overrides}"):
        materials = gather(recipe, path)
        model = build(recipe, path, materials, device=torch.device("cpu"), dtype=torch.float32)
        task = prepare(model, materials, recipe, lambda progress: None, group)
        shard(model, recipe.shard, group, torch.device("cpu"))
    task.open_features()
    task.learning.train()
    size = recipe.optim.batch_size
    parts = [task.make_batch(number, places) for places in group.parts(size, recipe.optim.accumulate)]
    shares = task.backward(parts, Step(5, size, autocast, torch.Generator().manual_seed(5), group))
    told, parameters = torch.stack(list(shares.values())), trained_parameters(model)
    sum_gradients(group, parameters, told)
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return dict(zip(shares, told.tolist(), strict=True)), found


def check_group(group):
    """Rows go where they belong, however they are divided."""
    for count in range(group.size, 12):
        rows_BX = torch.arange(count * 6).view(count, 2, 3)
        own = group.share(count)
        assert torch.equal(group.gather(rows_BX[own], count), rows_BX)
        wanted = torch.randint(count, (count,), generator=torch.Generator().manual_seed(count))
        assert torch.equal(group.fetch(rows_BX[own].half(), wanted.tolist()), rows_BX[wanted][own].half())
    everyone = list(range(group.size))
    assert group.objects(group.rank) == everyone and group.most(group.rank) == everyone[-1]
    assert group.sum(torch.tensor([1.0, group.rank])).tolist() == [group.size, sum(everyone)]
    assert group.is_any(group.rank == 1) and not group.is_any(False)


def threads_of_gloo():
    """The names of those of this process, on Linux; elsewhere none."""
    return [name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text().strip())]


def in_processes(number, *arguments, module="tests.train.processes", wait=True):
    """Run a module in so many processes, as torchrun would; their exit codes, or the processes themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(number)
    ]  # fmt: skip
    if not wait:
        return processes
    told = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * number, told
    return told


if __name__ == "__main__":
    out, *given = sys.argv[1:]
    cpu = torch.device("cpu")
    if out == "silent":
        with joined(cpu, timeout_s=3) as group:
            time.sleep(20 * group.rank)
            group.most(0)
    cases, changes = map(json.loads, given)
    with joined(cpu) as group:
        check_group(group)
        found = [gradients(Path(case.pop("path")), case, group) for case in cases]
        if group.is_first:
            torch.save(found, out)
        if changes:
            path = Path(changes.pop("path"))
            carry_out = importlib.import_module("blip2.train.run")._run
            carry_out(path, load_recipe(path, changes), group, cpu, lambda progress: None)
    is_sharded = "shard" in " ".join(map(str, given))  # then FSDP keeps the group for as long as the process
    assert is_sharded or not threads_of_gloo(), "the process group outlives the training"
