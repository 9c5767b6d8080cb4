"""Both stages with image encoders that the published layout does not know, from features on disk."""

import pytest
import torch

from blip2 import checkpoint, train
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
