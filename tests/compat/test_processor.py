"""The processor: where padding stands, what is in a row, and what is refused. Equality with the reference's tensors is
tested in tests/parity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from blip2 import Blip2Processor, BlipProcessor, checkpoint
from blip2.errors import CheckpointError, ImageError, OptionError
from tests import tiny

TEXTS = ["a photo of two dogs", "a"]
QUERIES = 4


@pytest.fixture(scope="module")
def processor(any_model):
    return Blip2Processor.from_pretrained(any_model)


def family(processor):
    return "opt" if processor(text="a").input_ids[0][0] == 2 else "t5"


def test_the_name_of_the_model_card_is_the_same_processor(any_model):
    made = BlipProcessor.from_pretrained(str(any_model))(tiny.picture(1), "a photo", return_tensors="pt")
    assert (made.input_ids[0, :QUERIES] == BlipProcessor.from_pretrained(any_model).image_token_id).all()


def test_an_opt_is_padded_before_the_text_whatever_the_files_say(any_model, tmp_path):
    shutil.copytree(any_model, tmp_path, dirs_exist_ok=True)
    for side in ("left", "right"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": side}))
        processor = Blip2Processor.from_pretrained(tmp_path)
        made = processor([tiny.picture(1)] * 2, TEXTS, padding=True, return_tensors="pt")
        longest, shortest = made.attention_mask.tolist()
        assert set(longest) == {1}
        pads = shortest.count(0)
        text = shortest[QUERIES:]
        assert shortest[:QUERIES] == [1] * QUERIES
        assert text == sorted(text, reverse=family(processor) == "t5") and 0 < pads < len(text)


def test_a_matching_model_has_its_own_special_tokens(matching_model):
    processor = Blip2Processor.from_pretrained(matching_model)
    made = processor(tiny.picture(1), ["two dogs", "red"], padding=True, return_tensors="pt")
    start, end, pad = (processor.tokenizer.token_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    assert made.input_ids[:, 0].tolist() == [start, start]
    assert made.input_ids[1, made.attention_mask[1].bool()][-1] == end and made.input_ids[1, -1] == pad
    assert processor.image_token_id is None, "the tiny one has no image token, so nothing stands before the text"


def test_images_alone_and_texts_alone(processor):
    assert list(processor(images=tiny.picture(1), return_tensors="pt")) == ["pixel_values"]
    made = processor(text="a photo", return_tensors="pt")
    assert list(made) == ["input_ids", "attention_mask"]
    assert processor.image_token_id not in made.input_ids


def test_images_of_any_kind(processor):
    array = np.asarray(tiny.picture(1))
    expected = processor(tiny.picture(1), return_tensors="pt").pixel_values
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for same in (array, tensor, [array], (tensor,), array[None], tensor[None]):
        assert torch.equal(processor(same, return_tensors="pt").pixel_values, expected)
    assert processor(np.stack([array] * 3), return_tensors="np").pixel_values.shape == (3, 3, 32, 32)


def test_numbers_need_not_agree_here(processor):
    """A matching model compares every image with every text; the generative one checks."""
    made = processor([tiny.picture(1)] * 3, "a photo", return_tensors="pt")
    assert len(made.pixel_values) == 3 and len(made.input_ids) == 1


def test_a_revision_without_image_token_gives_text_alone(any_model, tmp_path):
    model = checkpoint.load(any_model)
    model.config = replace(model.config, image_token_id=None)
    checkpoint.save(model, tmp_path, tokenizer=any_model / "tokenizer.json")
    processor = Blip2Processor.from_pretrained(tmp_path)
    assert processor(tiny.picture(1), "a photo").input_ids == processor(text="a photo").input_ids
    processor.save_pretrained(tmp_path / "alone")
    again = Blip2Processor.from_pretrained(tmp_path / "alone")
    assert again(tiny.picture(1), "a photo").input_ids == processor(text="a photo").input_ids


def test_what_is_typed_is_text(processor):
    made = processor(tiny.picture(1), "a <image> and </s>", return_tensors="pt")
    assert (made.input_ids == processor.image_token_id).sum() == QUERIES


def test_the_length_of_a_text_without_image_is_its_own(processor):
    assert len(processor(text="a photo of two dogs", max_length=6).input_ids[0]) == 6
    assert len(processor(tiny.picture(1), "a photo of two dogs", max_length=6).input_ids[0]) == 6


def test_decode_takes_one_row_or_many(processor):
    ids = processor(text="two dogs", return_tensors="pt").input_ids
    assert processor.decode(ids[0], skip_special_tokens=True).strip() == "two dogs"
    assert processor.decode(ids, skip_special_tokens=True) == processor.batch_decode(ids, skip_special_tokens=True)
    assert "</s>" in processor.decode(ids[0].tolist()) and "</s>" in processor.decode(ids[0].numpy())


def test_what_is_saved_is_read_again(processor, any_model, tmp_path):
    processor.save_pretrained(tmp_path / "new" / "folder")
    again = Blip2Processor.from_pretrained(tmp_path / "new" / "folder")
    expected, made = (each(tiny.picture(1), "a photo", return_tensors="pt") for each in (processor, again))
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    assert (tmp_path / "new/folder/tokenizer.json").read_bytes() == (any_model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither images nor text"),
        ({"text": []}, "at least one"),
        ({"text": [["a", "photo"]]}, "give a text"),
        ({"images": []}, "empty"),
        ({"text": TEXTS, "return_tensors": "pt"}, "padding=True"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors is 'tf'"),
        ({"text": "a", "padding": "left"}, "padding is 'left'"),
        ({"text": "a", "padding": "max_length"}, "no max_length"),
        ({"images": tiny.picture(1), "text": "a", "max_length": QUERIES}, "no room for text"),
    ],
)
def test_what_is_refused(processor, arguments, message):
    with pytest.raises(OptionError, match=message):
        processor(**arguments)


def test_pictures_and_files_that_cannot_be_read(processor, tmp_path):
    with pytest.raises(ImageError, match="uint8"):
        processor(np.zeros((8, 8, 3)))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Blip2Processor.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"'padding_side'; it takes .*revision"):
        Blip2Processor.from_pretrained(tmp_path, padding_side="left")


def test_what_it_returns_moves_and_casts_its_floats(processor):
    made = processor(tiny.picture(1), "a photo", return_tensors="pt")
    assert made.to("cpu", torch.float16) is made
    assert made.pixel_values.dtype == torch.float16
    assert made["input_ids"].dtype == made.attention_mask.dtype == torch.int64
    assert made.to(torch.float32).pixel_values.dtype == torch.float32
    assert made.to(device="cpu", dtype=torch.bfloat16).pixel_values.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="no labels here; there are input_ids"):
        _ = made.labels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(processor):
    for device in ("cuda", 0, torch.device("cuda")):
        with pytest.raises(OptionError, match="cannot be used"):
            processor(tiny.picture(1), return_tensors="pt").to(device, torch.float16)
