"""Both stages with image encoders that the published layout does not know, from features on disk."""

import pytest
import torch

import blip2
from blip2 import checkpoint, train
from tests import tiny
from tests.parity import encoders
from tests.test_other_encoders import assemble, save_encoder


@pytest.mark.parametrize("family", ["SigLIP", "DINOv2 with registers"])
def test_the_second_stage(write_recipe, family, tmp_path):
    save_encoder(family, tmp_path / "encoder")
    start = assemble(tmp_path / "start", tmp_path / "encoder")
    before = checkpoint.load(start).state_dict()
    out = train.run(write_recipe(2, start))
    assert next((tmp_path / "features").glob("*.bin")).stat().st_size > 0
    after = checkpoint.load(out).state_dict()
    frozen = {name for name in after if name.startswith("vision.") and not name.startswith("vision.post_norm")}
    for name, value in after.items():
        assert not (name in frozen and not torch.equal(before[name], value)), name
    assert not torch.equal(before["qformer.query_tokens"], after["qformer.query_tokens"])
    assert checkpoint.image_settings(out) == checkpoint.image_settings(start)


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_they_learn_at_another_size(write_recipe, family, tmp_path):
    """All of their weights; the positions of an encoder that turns its queries and keys are no weights."""
    save_encoder(family, tmp_path / "encoder")
    start = assemble(tmp_path / "start", tmp_path / "encoder")
    path = write_recipe(2, start)
    path.write_text(path.read_text().replace('features = "features"', ""))
    settings = {"vision.learns": True, "vision.layer_decay": 0.5, "vision.image_size": 42, "optim.accumulate": 2}
    before, after = (checkpoint.load(each) for each in (start, train.run(path, overrides=settings)))
    assert after.config.vision.image_size == 42 and after.vision.position_embedding.shape[1] >= 36
    old, new = before.vision.state_dict(), after.vision.state_dict()
    for name in old.keys() - {"position_embedding", "class_embedding"}:
        assert not torch.equal(old[name], new[name]), name
    if after.config.vision.rotary_base:
        assert not after.vision.position_embedding.any()
    assert blip2.load(tmp_path / "out2").caption(tiny.picture(1)) is not None
