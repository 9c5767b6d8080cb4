"""Both stages on a device that refuses operands of two devices: the losses of the CPU."""

import pytest

from blip2 import train
from tests.pretended import NAME, pretended


@pytest.mark.parametrize("stage", [1, 2])
def test_it_learns_as_the_cpu(stage, write_recipe, any_model, matching_model):
    recipe = write_recipe(stage, matching_model if stage == 1 else any_model)
    losses: dict[str, list[dict[str, float]]] = {}
    with pretended():
        for device in (NAME, "cpu"):
            found = losses.setdefault(device, [])
            train.run(
                recipe,
                report=lambda progress, found=found: found.append({**progress.losses, **progress.scores}),
                overrides={"device": device, "out": device, "data.features": f"{device}-features"},
            )
    assert sum(map(bool, losses[NAME])) == 8  # six steps, two evaluations
    for there, here in zip(losses[NAME], losses["cpu"], strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-4)
