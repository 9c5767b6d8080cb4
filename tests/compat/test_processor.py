"""The processor: where padding stands, what is in a row, and what is refused. Equality with the reference's tensors is
tested in tests/parity."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from blip2 import Blip2ForConditionalGeneration, Blip2Processor, BlipProcessor, checkpoint
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
    start, end, pad = processor.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[PAD]"])
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


def test_in_the_tokenizer_it_is_a_token(processor):
    ids = processor.tokenizer("a <image> and </s>", return_tensors="pt").input_ids
    assert (ids == processor.image_token_id).sum() == 1
    ids = processor.tokenizer("a <image> and </s>", split_special_tokens=True).input_ids
    assert ids == processor(text="a <image> and </s>").input_ids[0]


def test_text_before_pictures_is_put_right(processor):
    expected = processor(tiny.picture(1), "a photo", return_tensors="pt")
    with pytest.warns(UserWarning, match=r"write processor\(images=\.\.\., text=\.\.\.\)"):
        made = processor("a photo", tiny.picture(1), return_tensors="pt")
    assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_copies_are_the_same_processor(processor):
    for again in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        made, expected = (each(tiny.picture(1), "a </s> b", return_tensors="pt") for each in (again, processor))
        assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_settings_of_the_parts_are_taken_and_saved(any_model, tmp_path):
    other = {"t5": "left", "opt": "right"}[family(Blip2Processor.from_pretrained(any_model))]
    processor = Blip2Processor.from_pretrained(any_model, padding_side=other, pad_token="</s>", size=20)
    assert (processor.tokenizer.padding_side, processor.tokenizer.pad_token) == (other, "</s>")
    made = processor([tiny.picture(1)] * 2, TEXTS, padding=True, return_tensors="pt")
    assert made.pixel_values.shape[2:] == (20, 20)
    assert (made.attention_mask[1, -1] == 0) == (other == "right")
    processor.save_pretrained(tmp_path)
    again = Blip2Processor.from_pretrained(tmp_path)
    assert again.tokenizer.pad_token == "</s>" and again.image_processor.size == {"height": 20, "width": 20}
    processor.image_processor.do_rescale = False
    processor.image_processor.size = {"height": 20, "width": 31}
    processor.save_pretrained(tmp_path)
    made = Blip2Processor.from_pretrained(tmp_path)(tiny.picture(1), return_tensors="pt").pixel_values
    assert torch.equal(made, processor(tiny.picture(1), return_tensors="pt").pixel_values) and made.shape[3] == 31
    assert again.tokenizer.padding_side != other, "padding stands where the model needs it, whatever the files say"


@pytest.mark.parametrize(
    "wrong",
    [{"do_resize": "no"}, {"resample": 9}, {"rescale_factor": "a"}, {"image_std": [0, 1, 1], "do_rescale": False},
     {"image_mean": [1, 2], "do_rescale": False}, {"size": {"height": 20, "width": 10**9}},
     {"do_center_crop": 1, "resample": 2}],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense(any_model, tmp_path, wrong):
    shutil.copytree(any_model, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {next(iter(wrong))}"):
        Blip2Processor.from_pretrained(tmp_path)


def test_values_of_0_to_1_that_are_scaled_once_more_are_told(processor):
    floats = np.asarray(tiny.picture(1, size=32)) / 255
    with pytest.warns(UserWarning, match="do_rescale=False"):
        processor(floats)
    made = processor(floats, do_rescale=False, return_tensors="pt").pixel_values
    expected = processor(tiny.picture(1, size=32), return_tensors="pt").pixel_values
    torch.testing.assert_close(made, expected, atol=0.02, rtol=0)


def test_what_a_processor_does_not_do_says_what_to_do(processor, tmp_path):
    for call, words in (
        (lambda: processor.apply_chat_template([{"role": "user", "content": "hi"}]), "write the prompt yourself"),
        (lambda: processor.push_to_hub("me/model"), "hf upload"),
        (lambda: processor.save_pretrained(tmp_path, push_to_hub=True), "hf upload"),
        (lambda: setattr(processor.tokenizer, "pad_token", "[PAD2]"), "add it first"),
        (lambda: processor.tokenizer("a", text_pair="b"), "text_pair is 'b'"),
        (lambda: processor(tiny.picture(1), "a", do_center_crop=True), "resized as a whole"),
        (lambda: processor(tiny.picture(1), "a", size={"longest_edge": 5}), "size is"),
        (lambda: processor(text="a", padding=True, text_kwargs={"padding": False}), "padding is given twice"),
        (lambda: processor(np.zeros((2, 9, 9, 3), np.uint8).tolist()), "not an image"),
        (lambda: setattr(processor.tokenizer, "padding_side", "middle"), "padding_side is 'middle'"),
        (lambda: Blip2Processor(tiny.picture(1), processor.tokenizer), "give a BlipImageProcessor"),
    ):
        with pytest.raises((OptionError, ImageError), match=words):
            call()
    with pytest.raises(OptionError, match="40x40, 8x8"):
        processor([tiny.picture(1), tiny.picture(1, size=9)], do_resize=False, return_tensors="pt")


def test_tokens_are_added(any_model, tmp_path):
    processor = Blip2Processor.from_pretrained(any_model)
    model = Blip2ForConditionalGeneration.from_pretrained(any_model)
    before = len(processor.tokenizer)
    assert processor.tokenizer.add_tokens("<thing>", special_tokens=True) == 1 == len(processor.tokenizer) - before
    assert processor.tokenizer.add_special_tokens({"mask_token": "<hidden>"}) == 1
    assert processor.tokenizer.mask_token_id == before + 1
    assert before in processor.tokenizer("a <thing>").input_ids
    assert before not in processor(text="a <thing>").input_ids[0]
    processor.save_pretrained(tmp_path)
    assert len(Blip2Processor.from_pretrained(tmp_path).tokenizer) == before + 2
    inputs = processor(tiny.picture(1), "a", return_tensors="pt")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    inputs.input_ids[0, -1] = vocabulary
    with pytest.raises(OptionError, match=f"contain {vocabulary}, this model has {vocabulary} tokens"):
        model.generate(**inputs)
    model.resize_token_embeddings(vocabulary + 2)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > 3


def test_an_old_revision_is_given_its_image_token(any_model, tmp_path):
    """As people do it where a checkpoint has none."""
    model = checkpoint.load(any_model)
    model.config = replace(model.config, image_token_id=None)
    checkpoint.save(model, tmp_path, tokenizer=any_model / "tokenizer.json")
    expected = Blip2Processor.from_pretrained(any_model)(tiny.picture(1), "a photo", return_tensors="pt")
    processor, old = Blip2Processor.from_pretrained(tmp_path), Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    answer = old.generate(**processor(tiny.picture(1), "a photo", return_tensors="pt"))
    processor.num_query_tokens = old.config.num_query_tokens
    processor.tokenizer.add_tokens(["<image>"], special_tokens=True)
    old.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    inputs = processor(tiny.picture(1), "a photo", return_tensors="pt")
    assert torch.equal(inputs.input_ids, expected.input_ids)
    assert old.generate(**inputs)[0, -len(answer[0]) :].tolist() == answer[0].tolist()


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
        ({"images": tiny.picture(1), "text": "a", "max_length": QUERIES}, "leaves no text"),
    ],
)
def test_what_is_refused(processor, arguments, message):
    with pytest.raises(OptionError, match=message):
        processor(**arguments)


def test_pictures_and_files_that_cannot_be_read(processor, tmp_path):
    for array in (np.full((8, 8, 3), 255.5), np.full((8, 8, 3), np.nan), np.full((8, 8, 3), -1), np.full((4, 4), "a")):
        with pytest.raises(ImageError, match="0 to 255"):
            processor(array)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Blip2Processor.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"'pading_side'; it takes .*revision"):
        Blip2Processor.from_pretrained(tmp_path, pading_side="left")


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
