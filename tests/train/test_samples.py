"""Pages of held-out images with what the model says of them, while it learns."""

import json
import re

import pytest

from blip2 import train
from blip2.errors import RecipeError
from tests.train.processes import in_processes
from tests.train.test_distributed import assert_same_training

EVERY = {"sample_every": 4}


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_pages(write_recipe, matching_model, opt_model, stage, features):
    """After each so many steps and the last; what is learnt is the same with or without."""
    path = write_recipe(stage, matching_model if stage == 1 else opt_model)
    if not features:
        path.write_text(path.read_text().replace('features = "features"', ""))
    out = train.run(path, overrides=EVERY | {"optim.ema": 0.5})
    assert sorted(page.name for page in (out / "samples").iterdir()) == ["0000004.html", "0000006.html"]
    text = (out / "samples" / "0000006.html").read_text()
    assert text.count("<figure>") == text.count("data:image/jpeg;base64,") == 8
    assert "picture000.png" in text and "after step 6" in text
    assert re.search(r"(dogs|car|two)</p><p", text), "what the row says stands there"
    plain = train.run(path, overrides={"out": "plain", "optim.ema": 0.5})
    assert_same_training(out, plain)


def test_of_every_language_model(write_recipe, any_model):
    out = train.run(write_recipe(2, any_model), overrides=EVERY)
    assert len(list((out / "samples").iterdir())) == 2


@pytest.mark.slow
def test_with_weights_that_are_shared_out(write_recipe, any_model, tmp_path):
    path = write_recipe(2, any_model)
    training = {"path": str(path), "shard": ["language"], "out": "shared"} | EVERY
    in_processes(2, tmp_path / "found.pt", "[]", json.dumps(training))
    alone = train.run(path, overrides=EVERY)
    for page in sorted((alone / "samples").iterdir()):
        found = (tmp_path / "shared" / "samples" / page.name).read_text()
        assert found == page.read_text().replace(f"Samples of {alone.name} ", "Samples of shared ")


def test_a_page_that_cannot_be_written_does_not_end_a_training(write_recipe, opt_model, tmp_path):
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "samples").write_text("in the way")
    seen = []
    train.run(write_recipe(2, opt_model), report=seen.append, overrides=EVERY)
    assert sum(progress.message.startswith("no samples after step") for progress in seen) == 2


def test_without_rows_that_are_held_out(write_recipe, opt_model):
    path = write_recipe(2, opt_model)
    path.write_text(path.read_text().partition("[evaluation]")[0])
    with pytest.raises(RecipeError, match="sample_every: needs held-out rows; add"):
        train.run(path, overrides=EVERY)
