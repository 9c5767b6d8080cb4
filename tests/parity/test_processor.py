"""The processor and its parts give what Hugging Face's own give, whatever arguments they are called with."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from blip2 import Blip2Processor
from tests import tiny

TEXTS = ["Question: how many dogs are there? Answer:", "a photo of", "", "naïve café — 🐕🚗 日本"]
NAMES = {
    "opt": {"bos": "</s>", "eos": "</s>", "unk": "</s>", "pad": "<pad>"},
    "t5": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}


@pytest.fixture(scope="module")
def processors(any_model):
    """The reference's, set as the published ones of its family are, and ours."""
    theirs, ours = transformers.Blip2Processor.from_pretrained(any_model), Blip2Processor.from_pretrained(any_model)
    family = "opt" if theirs.tokenizer.convert_tokens_to_ids("</s>") == 2 else "t5"
    for name, token in NAMES[family].items():
        setattr(theirs.tokenizer, f"{name}_token", token)
    theirs.tokenizer.padding_side = "left" if family == "opt" else "right"
    return theirs, ours


def check(one, other, where="value"):
    """Equal in values, and in types of tensors and arrays."""
    if hasattr(one, "keys"):
        assert set(one.keys()) == set(other.keys()), where
        for key in one.keys():  # noqa: SIM118  the reference's is no dictionary
            check(one[key], other[key], key)
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other), where
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for part, its in zip(one, other, strict=True):
            check(part, its, where)
    else:
        assert one == other, where


def both(processors, call):
    check(*(call(processor) for processor in processors))


OPTIONS = [
    {"padding": True, "return_tensors": "np"},
    {"padding": "do_not_pad"},
    {"padding": "longest", "pad_to_multiple_of": 8, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 12},
    {"padding": True, "padding_side": "left"},
    {"padding": True, "padding_side": "right"},
    {"padding": True, "truncation": "longest_first", "max_length": 9},
    {"add_special_tokens": False},
    {"return_attention_mask": False},
    {"return_token_type_ids": True},
    {"return_special_tokens_mask": True, "padding": True},
    {"return_offsets_mapping": True, "padding": True},
    {"stride": 2, "verbose": False},
    {"text_kwargs": {"padding": True, "add_special_tokens": False}, "images_kwargs": {"do_rescale": False}},
    {"common_kwargs": {"return_tensors": "pt"}, "padding": True},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_resize": False},
    {"size": 20, "crop_size": {"height": 9, "width": 9}},
    {"size": {"height": 20, "width": 31}, "resample": Image.Resampling.LANCZOS},
    {"size": {"shortest_edge": 20}, "resample": 2},
    {"rescale_factor": 1 / 127.5, "image_mean": [0.5, 0.4, 0.3], "image_std": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_arguments(processors, options):
    pictures = [tiny.picture(seed, size=30 + 2 * seed) for seed in range(4)]
    both(processors, lambda processor: processor(images=pictures, text=TEXTS, **options))


def arrays():
    chance = np.random.default_rng(0)
    bytes_CHW = chance.integers(0, 255, (3, 40, 37)).astype(np.uint8)
    floats_CHW = chance.random((3, 40, 37))
    return {
        "bytes, channels first": bytes_CHW,
        "bytes, channels last": np.moveaxis(bytes_CHW, 0, -1),
        "whole numbers": bytes_CHW.astype(np.int64),
        "whole floats": bytes_CHW.astype(np.float32),
        "floats of 0 to 1": floats_CHW,
        "floats of 0 to 1, channels last": np.moveaxis(floats_CHW, 0, -1).astype(np.float32),
        "grey, channels first": bytes_CHW[:1],
        "grey, channels last": np.moveaxis(bytes_CHW[:1], 0, -1),
        "transparent": chance.integers(0, 255, (4, 40, 37)).astype(np.uint8),
        "transparent floats": chance.random((40, 37, 4)),
        "several": chance.integers(0, 255, (2, 3, 40, 37)).astype(np.uint8),
        "either end may be channels": bytes_CHW[:, :, :3],
    }


@pytest.mark.parametrize("kind", arrays())
@pytest.mark.filterwarnings("ignore")
def test_arrays_and_tensors(processors, kind):
    array = arrays()[kind]
    for pictures in (array, [torch.from_numpy(array.copy())]):
        for options in (
            {},
            {"do_rescale": False, "return_tensors": "pt"},
            {"do_resize": False},
            {"do_resize": False, "do_rescale": False, "do_normalize": False},
        ):
            both(processors, lambda each, pictures=pictures, options=options: each(images=pictures, **options))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_pictures_of_any_mode_in_lists_of_lists(processors, mode):
    pictures = [[tiny.picture(1, size=45).convert(mode)] * 2, [tiny.picture(2)]]
    both(processors, lambda each: each(images=pictures))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True, "return_tensors": "pt"},
        {"add_special_tokens": False, "truncation": True, "max_length": 3},
        {"max_length": 12, "padding": "max_length", "truncation": True, "return_tensors": "np"},
        {"return_length": True, "return_offsets_mapping": True, "return_token_type_ids": True},
    ],
    ids=str,
)
def test_the_tokenizer_is_called(processors, options):
    for texts in (TEXTS, TEXTS[0], "a </s> b <image> c"):
        both(processors, lambda each, texts=texts: each.tokenizer(texts, **options))
    both(processors, lambda each: each.tokenizer("a dog", text_target="two"))


ROWS = [
    {"input_ids": [[1], [1, 2]]},
    [{"input_ids": [5, 4], "attention_mask": [1, 1]}, {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}],
    [{"input_ids": torch.tensor([5])}, {"input_ids": torch.tensor([5, 7])}],
    {"input_ids": [5, 6], "special_tokens_mask": [0, 1]},
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_tensors": "pt"},
        {"padding": "max_length", "max_length": 7},
        {"pad_to_multiple_of": 4, "padding_side": "left"},
    ],
    ids=str,
)
def test_pad(processors, options):
    for rows in ROWS:
        both(processors, lambda each, rows=rows: each.tokenizer.pad(copy.deepcopy(rows), **options))


def test_the_vocabulary(processors):
    for call in (
        lambda tokenizer: tokenizer.encode("a dog", return_tensors="pt"),
        lambda tokenizer: tokenizer.tokenize("a dogs </s>"),
        lambda tokenizer: tokenizer.convert_tokens_to_ids("</s>"),
        lambda tokenizer: tokenizer.convert_tokens_to_ids(["</s>", "no such token", "a"]),
        lambda tokenizer: tokenizer.convert_ids_to_tokens([2, 9, 1], skip_special_tokens=True),
        lambda tokenizer: tokenizer.convert_ids_to_tokens(9),
        lambda tokenizer: tokenizer.decode([2, 9, 33, 2]),
        lambda tokenizer: tokenizer.decode(9),
        lambda tokenizer: tokenizer.decode(torch.tensor([[2, 9], [4, 1]]), skip_special_tokens=True),
        lambda tokenizer: tokenizer.decode([2, 9, 33], clean_up_tokenization_spaces=True),
        lambda tokenizer: tokenizer.batch_decode([[5], [6, 2]], skip_special_tokens=True),
        lambda tokenizer: tokenizer.batch_decode([5, 6]),
        len,
        lambda tokenizer: tokenizer.vocab_size,
        lambda tokenizer: tokenizer.get_vocab(),
        lambda tokenizer: tokenizer.get_added_vocab(),
        lambda tokenizer: [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token],
        lambda tokenizer: [tokenizer.cls_token, tokenizer.mask_token_id, tokenizer.padding_side],
        lambda tokenizer: tokenizer.model_max_length,
        lambda tokenizer: list(tokenizer.model_input_names),
        lambda tokenizer: sorted(tokenizer.all_special_ids),
        lambda tokenizer: tokenizer.num_special_tokens_to_add(),
    ):
        both(processors, lambda each, call=call: call(each.tokenizer))


def test_the_processor_itself(processors):
    for call in (
        lambda each: each.model_input_names,
        lambda each: each.to_dict()["num_query_tokens"],
        lambda each: {name: value for name, value in each.image_processor.to_dict().items() if value is not None},
        lambda each: str(getattr(each.image_token, "content", each.image_token)),
        lambda each: each.post_process_image_text_to_text([[5, 6], [7, 2]]),
        lambda each: each.image_processor(tiny.picture(1), return_tensors="pt"),
        lambda each: type(each)(each.image_processor, each.tokenizer)(tiny.picture(1), "a dog"),
        lambda each: type(each)(each.image_processor, each.tokenizer, num_query_tokens=2)(tiny.picture(1), "a dog"),
    ):
        both(processors, call)


def test_what_is_set_is_heeded(processors):
    def changed(processor):
        processor = type(processor)(copy.deepcopy(processor.image_processor), copy.deepcopy(processor.tokenizer), 4)
        processor.image_processor.do_rescale = False
        processor.image_processor.size = {"height": 20, "width": 20}
        processor.tokenizer.padding_side = {"left": "right", "right": "left"}[processor.tokenizer.padding_side]
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    processors = [changed(processor) for processor in processors]
    both(processors, lambda each: each([tiny.picture(1)] * 4, TEXTS, padding=True, return_tensors="pt"))
    both(processors, lambda each: each.tokenizer(TEXTS, padding=True))
