"""Both stages on a device that refuses operands of two devices: the losses of the CPU.

Each in a process of its own, since torch has to know of a device before it goes backward for the first time.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended import NAME

LEARN = f"""
import json, sys
from pathlib import Path
from blip2 import train
from tests.pretended import pretended

found = {{}}
path, overrides = Path(sys.argv[1]), json.loads(sys.argv[2])
with pretended():
    for device in ("{NAME}", "cpu"):
        losses = found[device] = []
        train.run(
            path,
            report=lambda progress: losses.append({{**progress.losses, **progress.scores}}),
            overrides=overrides | {{"device": device, "out": device}}
            | ({{"data.features": f"{{device}}-features"}} if "features" in path.read_text() else {{}}),
        )
print(json.dumps(found))
"""


def losses(recipe: Path, overrides: dict) -> dict[str, list[dict[str, float]]]:
    """What each device reported."""
    command = [sys.executable, "-c", LEARN, str(recipe), json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, list[dict[str, float]]]) -> None:
    assert sum(map(bool, found[NAME])) == 8  # six steps, two evaluations
    for there, here in zip(found[NAME], found["cpu"], strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-4)


def test_stage_1_learns_as_on_the_cpu(write_recipe, matching_model):
    check(losses(write_recipe(1, matching_model), {}))


@pytest.mark.parametrize(
    "overrides",
    [{}, pytest.param({"lora.base": "int8", "lora.parts": ["language", "qformer"]}, marks=pytest.mark.slow)],
)
def test_stage_2_learns_as_on_the_cpu(write_recipe, any_model, overrides):
    check(losses(write_recipe(2, any_model), overrides))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.slow
def test_so_does_an_image_encoder_and_a_qformer_that_reads(write_recipe, matching_model, opt_model, stage):
    """In parts, so that each image is seen twice, and of another size."""
    path = write_recipe(stage, matching_model if stage == 1 else opt_model)
    path.write_text(path.read_text().replace('features = "features"', ""))
    settings = {"vision.learns": True, "vision.layer_decay": 0.9, "vision.image_size": 48, "optim.accumulate": 2}
    check(losses(path, settings | ({} if stage == 1 else {"text_branch": str(matching_model)})))
