"""The matching model behind Hugging Face's arguments: no text is cut, no image left out. Equality with the reference's
results is tested in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blip2 import Blip2ForImageTextRetrieval, Blip2Processor, checkpoint
from blip2.errors import OptionError
from tests import tiny

QUERIES = 4
TEXTS = ["two dogs", "a photo of a red car on the left"]
IMAGE_TOKEN = 199


@pytest.fixture(scope="module")
def model(matching_model):
    return Blip2ForImageTextRetrieval.from_pretrained(matching_model)


@pytest.fixture(scope="module")
def newer(matching_model):
    """The same with an image token, as the newer revisions have it."""
    loaded = checkpoint.load(matching_model)
    loaded.config = replace(loaded.config, image_token_id=IMAGE_TOKEN)
    return Blip2ForImageTextRetrieval(loaded)


@pytest.fixture
def inputs(matching_model):
    processor = Blip2Processor.from_pretrained(matching_model)
    return processor([tiny.picture(seed) for seed in range(2)], TEXTS, return_tensors="pt", padding=True)


def with_image_tokens(inputs, number=QUERIES):
    tokens = torch.full((len(inputs.input_ids), number), IMAGE_TOKEN)
    return {
        "pixel_values": inputs.pixel_values,
        "input_ids": torch.cat([tokens, inputs.input_ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(tokens), inputs.attention_mask], dim=1),
    }


@pytest.mark.parametrize("head", [False, True])
@torch.no_grad()
def test_a_text_is_read_whole_with_image_tokens_or_without(model, newer, inputs, head):
    expected = model(**inputs, use_image_text_matching_head=head).logits_per_image
    assert expected.shape == (2, 2)
    for given in (inputs, with_image_tokens(inputs)):
        assert torch.equal(newer(**given, use_image_text_matching_head=head).logits_per_image, expected)


@torch.no_grad()
def test_one_image_with_many_texts_and_one_text_with_many_images(model, inputs):
    pixels, ids, mask = inputs.pixel_values, inputs.input_ids, inputs.attention_mask
    pairs = {(i, t): model(pixels[i : i + 1], ids[t : t + 1], mask[t : t + 1], True) for i in (0, 1) for t in (0, 1)}
    pairs = {place: output.logits_per_image[0] for place, output in pairs.items()}
    one_image = model(pixels[:1], ids, mask, use_image_text_matching_head=True).logits_per_image
    one_text = model(pixels, ids[:1], mask[:1], use_image_text_matching_head=True).logits_per_image
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(one_image, torch.stack([pairs[0, 0], pairs[0, 1]]), **close)
    torch.testing.assert_close(one_text, torch.stack([pairs[0, 0], pairs[1, 0]]), **close)
    every = model(pixels, ids, mask).logits_per_image
    torch.testing.assert_close(model(pixels[:1], ids, mask).logits_per_image, every[:1], **close)
    assert not torch.allclose(pairs[0, 0], pairs[1, 0])


@torch.no_grad()
def test_padding_on_the_other_side_changes_nothing(model, inputs):
    expected = model(**inputs).logits_per_image
    order = inputs.attention_mask.argsort(dim=1, stable=True)
    turned = {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    assert not torch.equal(turned["input_ids"], inputs.input_ids)
    torch.testing.assert_close(model(inputs.pixel_values, **turned).logits_per_image, expected, atol=1e-6, rtol=0)


def test_what_would_cut_a_text_or_leave_out_an_image(model, newer, inputs):
    with pytest.raises(OptionError, match=f"has {QUERIES - 1} image tokens"):
        newer(**with_image_tokens(inputs, QUERIES - 1))
    with pytest.raises(OptionError, match="3 images and 2 texts"):
        model(torch.rand(3, 3, 32, 32), inputs.input_ids, inputs.attention_mask, use_image_text_matching_head=True)
    with pytest.raises(OptionError, match="attention_mask is"):
        model(inputs.pixel_values, inputs.input_ids, inputs.attention_mask[:1])
    with pytest.raises(OptionError, match="has no text"):
        model(inputs.pixel_values, inputs.input_ids, torch.zeros_like(inputs.input_ids))
    with pytest.raises(OptionError, match="contain 500"):
        model(inputs.pixel_values, torch.full_like(inputs.input_ids, 500))


@torch.no_grad()
def test_what_is_saved_is_read_again(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert again.to("cpu").dtype == torch.float32 and again.config == model.config
