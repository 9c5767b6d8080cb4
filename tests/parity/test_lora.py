"""Adapters that are trained here, read by `peft` onto the reference's model: the logits of ours with them merged."""

from __future__ import annotations

import pytest
import torch

from blip2 import checkpoint
from blip2.checkpoint.adapters import Adapters
from blip2.train import lora
from blip2.train.recipes import LoraRecipe

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_is_written(pair, their_inputs, tmp_path, rslora):
    pair.theirs.save_pretrained(tmp_path / "base")
    model = checkpoint.load(tmp_path / "base")
    recipe = LoraRecipe(parts=("language", "qformer", "vision"), rank=3, alpha=5.0, rslora=rslora)
    lora.put(model, recipe)
    torch.manual_seed(1)
    for change in model.lora.children():
        for second_Nr in change.second:
            torch.nn.init.normal_(second_Nr, std=0.1)
    lora.save(model, tmp_path / "adapter", recipe, "base")

    def logits(theirs):
        started = torch.tensor([[0, 5, 7]] * len(pair.pixels_BCHW))
        labels = {} if pair.family == "opt" else {"decoder_input_ids": started}
        with torch.inference_mode():
            return theirs(pixel_values=pair.pixels_BCHW, **their_inputs, **labels).logits

    read = peft.PeftModel.from_pretrained(pair.theirs, tmp_path / "adapter").eval()
    merged = checkpoint.load(tmp_path / "base", adapters=Adapters.of(tmp_path / "adapter"))
    checkpoint.save(merged, tmp_path / "merged")
    again = type(pair.theirs).from_pretrained(tmp_path / "merged").eval()
    with_adapter = logits(read)
    torch.testing.assert_close(with_adapter, logits(again), rtol=1e-4, atol=1e-4)
    with read.disable_adapter():
        assert (logits(read) - with_adapter).abs().max() > 0.01
    names = {name for name, _ in read.named_parameters() if ".lora_A." in name}
    assert len(names) == sum(len(change.names) for change in model.lora.children())
    read.unload()
