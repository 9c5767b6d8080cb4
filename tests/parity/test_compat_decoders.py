"""The Hugging Face names with language models of the Llama make: as transformers' own classes have them."""

from __future__ import annotations

import json
import logging

import pytest
import tokenizers
import torch
from torch.testing import assert_close

from blip2 import Blip2ForConditionalGeneration, Blip2Processor
from blip2.errors import OptionError

transformers = pytest.importorskip("transformers")

from tests.parity.decoders import whole  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
MAKE = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "phi3", "granite"]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
WAYS = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": -1.0},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_k": 9, "temperature": 0.7},
]


@pytest.fixture(scope="module", params=MAKE)
def twins(request, tmp_path_factory):
    theirs = whole(request.param, 3)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, Blip2ForConditionalGeneration.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def inputs(twins):
    """Three images and texts of mixed length, padded before the two: between, the reference counts padding where a
    layer has a window."""
    image = twins[0].config.image_token_index
    texts = [[2], [2, 9, 33, 12, 30], [2, 8, 7]]
    ids = torch.tensor([[1] * (5 - len(text)) + [image] * 5 + text for text in texts])
    return {
        "pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(3)),
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
    }


@torch.no_grad()
def test_the_same_ids(twins, inputs):
    for options in WAYS:
        found = []
        for model in twins[:2]:
            torch.manual_seed(5)
            found.append(model.generate(**inputs, max_new_tokens=10, eos_token_id=[5, 17], pad_token_id=1, **options))
        assert found[0].tolist() == found[1].tolist(), options


@torch.no_grad()
def test_the_same_ids_without_a_prompt(twins, inputs):
    pixels = {"pixel_values": inputs["pixel_values"]}
    theirs, ours = (
        model.generate(**pixels, max_new_tokens=6, min_new_tokens=2, pad_token_id=1).tolist() for model in twins[:2]
    )
    assert theirs == ours


@torch.no_grad()
def test_what_is_seen_on_the_way(twins, inputs):
    watching = {
        "max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 1, "return_dict_in_generate": True,
        "output_scores": True, "output_hidden_states": True, "output_attentions": True,
    }  # fmt: skip
    theirs, ours = (model.generate(**inputs, **watching) for model in twins[:2])
    assert theirs.sequences.tolist() == ours.sequences.tolist()
    assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), **TOLERANCE)
    for mine, its in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for one, other in zip(mine, its, strict=True):
            assert_close(one[:, -1], other[:, -1], **TOLERANCE)


def test_the_same_logits_loss_and_gradients(twins, inputs):
    is_word = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != twins[0].config.image_token_index)
    labels = inputs["input_ids"].masked_fill(~is_word, -100)
    found = []
    for model in twins[:2]:
        model.zero_grad()
        out = model(**inputs, labels=labels)
        out.loss.backward()
        names = [name for name, each in model.named_parameters() if each.grad is not None]
        found.append((out, {name: model.get_parameter(name).grad for name in names}))
    (theirs, its), (ours, mine) = found
    real = inputs["attention_mask"].bool()
    assert_close(ours.logits[real], theirs.logits[real], **TOLERANCE)
    assert_close(ours.loss, theirs.loss, **TOLERANCE)
    assert its.keys() == mine.keys()
    for name, gradient in its.items():
        assert_close(mine[name], gradient, atol=1e-4, rtol=1e-2, msg=name)


@torch.no_grad()
def test_a_text_is_continued_from_what_was_kept(twins):
    ids = torch.tensor([[2, 9, 33, 12, 30, 8, 7, 3]])
    theirs, ours = (model.language_model for model in twins[:2])
    expected = theirs(input_ids=ids).logits
    first = ours(input_ids=ids[:, :5], use_cache=True)
    second = ours(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], dim=1), expected, **TOLERANCE)


def test_the_same_names_and_what_is_saved_is_read(twins, inputs, tmp_path):
    theirs, ours, _ = twins
    state, its = ours.state_dict(), theirs.state_dict()
    assert state.keys() == its.keys()
    for name, tensor in its.items():
        assert torch.equal(state[name], tensor), name
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert ours.config.text_config.model_type == theirs.config.text_config.model_type
    ours.save_pretrained(tmp_path)
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert_close(again(**inputs).logits, theirs(**inputs).logits)
    drawn = Blip2ForConditionalGeneration(theirs.config)  # of transformers' own configuration
    assert drawn.state_dict().keys() == its.keys()


def test_a_head_that_is_replaced_and_a_table_that_grows_are_used(twins, inputs, tmp_path):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(twins[2], attn_implementation="eager")
    ours = Blip2ForConditionalGeneration.from_pretrained(twins[2])
    for model in (theirs, ours):
        model.resize_token_embeddings(model.config.text_config.vocab_size + 7)
    assert ours.get_input_embeddings().num_embeddings == theirs.get_input_embeddings().num_embeddings
    assert ours(**inputs).logits.shape == theirs(**inputs).logits.shape
    weight = torch.randn(ours.get_output_embeddings().weight.shape, generator=torch.Generator().manual_seed(1))
    for model in (theirs, ours):
        head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = torch.nn.Parameter(weight.clone())
        model.language_model.lm_head = head
    with torch.no_grad():
        assert_close(ours(**inputs).logits[:, -1], theirs(**inputs).logits[:, -1], **TOLERANCE)


def test_token_ids_that_are_set_are_saved(twins, tmp_path):
    ours = Blip2ForConditionalGeneration.from_pretrained(twins[2])
    for ends in ([5, 17], 9):
        ours.config.text_config.eos_token_id = ends
        ours.save_pretrained(tmp_path)
        again = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
        assert again.config.text_config.eos_token_id == ends
        assert list(again.model.config.language.end_token_ids) == ([ends] if isinstance(ends, int) else ends)
        theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
        assert theirs.config.text_config.eos_token_id == ends


def test_the_processor_begins_a_text_as_the_tokenizer_s_file_says(tmp_path):
    whole("llama", 3).save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(number): number for number in range(20)}, "3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["2", "5", "<image>"])
    words.post_processor = tokenizers.processors.TemplateProcessing(single="2 $A", special_tokens=[("2", 2)])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "2", "eos_token": "5", "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Blip2Processor.from_pretrained(tmp_path)
    texts = ["7 8 9", "10"]
    with pytest.raises(OptionError, match="has no padding token"):
        ours(text=texts, padding=True)
    for tokenizer in (theirs, ours.tokenizer):
        tokenizer.pad_token = tokenizer.eos_token
    expected, found = theirs(texts, padding=True), ours(text=texts, padding=True)
    assert found.input_ids == expected.input_ids and found.attention_mask == expected.attention_mask
    assert ours.decode([2, 7, 8, 5], skip_special_tokens=True) == theirs.decode([2, 7, 8, 5], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "umt5"])
def test_others_are_named(family, tmp_path):
    whole(family, 1).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=rf"a {family}.*use blip2\.load"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path)
