"""`InstructBlipForConditionalGeneration` and `InstructBlipProcessor` give what Hugging Face's own give."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import blip2
from blip2 import Blip2ForConditionalGeneration, InstructBlipConfig, InstructBlipForConditionalGeneration
from blip2.errors import CheckpointError, OptionError
from tests import tiny

transformers = pytest.importorskip("transformers")

from tests.parity import instruct  # noqa: E402
from tests.parity.test_instruct import PROMPTS, pictures  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

WAYS = [
    {"max_new_tokens": 10},
    {},
    {"max_new_tokens": 10, "num_beams": 5},
    {"max_new_tokens": 12, "num_beams": 5, "repetition_penalty": 1.5, "length_penalty": 1.0, "min_length": 1},
    {"max_new_tokens": 9, "num_beams": 4, "num_return_sequences": 3, "length_penalty": -1.0},
    {"max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True},
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=instruct.LANGUAGES)
def published(request, tmp_path_factory):
    """The reference's model and processor, and ours, of one folder."""
    folder = tmp_path_factory.mktemp("published")
    theirs, its = instruct.saved(request.param, 5, folder)
    ours = InstructBlipForConditionalGeneration.from_pretrained(folder)
    return (theirs, its), (ours, blip2.InstructBlipProcessor.from_pretrained(folder)), folder


def equal(one, other):
    assert set(one.keys()) == set(other.keys())
    for name in one.keys():  # noqa: SIM118  the reference's is no dictionary
        if isinstance(other[name], torch.Tensor):
            assert_close(one[name], other[name], atol=1e-6, rtol=0)
        else:
            assert len(one[name]) == len(other[name]), name
            for row, its in zip(one[name], other[name], strict=True):
                assert np.array_equal(np.asarray(row), np.asarray(its)), name


@pytest.mark.parametrize(
    "options",
    [
        {"return_tensors": "pt", "padding": True},
        {"return_tensors": "np", "padding": "longest", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40},
        {"truncation": True, "max_length": 38, "padding": True, "return_tensors": "pt"},
        {},
    ],
    ids=str,
)
def test_the_processor(published, options):
    (_, its), (_, ours), _ = published
    expected = its(images=pictures(), text=PROMPTS, **options)
    # The reference pads this text where the language model's is padded, which changes what is seen of an image.
    read = its.qformer_tokenizer(PROMPTS, **options)
    expected["qformer_input_ids"] = read["input_ids"]
    expected["qformer_attention_mask"] = read["attention_mask"]
    equal(ours(images=pictures(), text=PROMPTS, **options), expected)


def test_one_text_and_one_picture(published):
    (_, its), (_, ours), _ = published
    for given in ({"text": PROMPTS[1]}, {"images": tiny.picture(1)}, {"images": tiny.picture(2), "text": PROMPTS[0]}):
        equal(ours(**given, return_tensors="pt"), its(**given, return_tensors="pt"))
    assert set(ours.model_input_names) == set(its.model_input_names)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_generate(published, options):
    (theirs, its), (ours, _), _ = published
    for picture, text in zip(pictures(), PROMPTS, strict=True):
        inputs = its(images=picture, text=text, return_tensors="pt")
        expected, found = (model.generate(**inputs, do_sample=False, **options) for model in (theirs, ours))
        if options.get("return_dict_in_generate"):
            assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
            expected, found = expected.sequences, found.sequences
        assert found.tolist() == expected.tolist()


def test_a_batch_is_its_rows(published):
    """Whatever stands beside a question; padding of either text changes nothing."""
    _, (ours, processor), _ = published
    together = processor(images=pictures(), text=PROMPTS, return_tensors="pt", padding=True)
    out = ours.generate(**together, num_beams=5, max_new_tokens=8, output_scores=True)
    for row, (picture, text) in enumerate(zip(pictures(), PROMPTS, strict=True)):
        alone = ours.generate(
            **processor(images=picture, text=text, return_tensors="pt"), num_beams=5, max_new_tokens=8
        )[0]
        new = 0 if ours.config.is_encoder_decoder else together["input_ids"].shape[1]
        own = 0 if new == 0 else len(alone) - min(8, len(alone))
        found = [token for token in out[row, new:].tolist() if token != ours.config.text_config.pad_token_id]
        assert found == [token for token in alone[own:].tolist() if token != ours.config.text_config.pad_token_id]


def test_forward_and_features(published):
    (theirs, its), (ours, _), _ = published
    inputs = its(images=tiny.picture(3), text=PROMPTS[3], return_tensors="pt")
    decoded = {"decoder_input_ids": torch.tensor([[0, 7, 9, 30]])} if ours.config.is_encoder_decoder else {}
    expected, found = theirs(**inputs, **decoded), ours(**inputs, **decoded)
    assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert_close(found.qformer_outputs.last_hidden_state, expected.qformer_outputs.last_hidden_state, atol=1e-4, rtol=0)
    seen = {name: inputs[name] for name in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")}
    expected, found = (model.get_image_features(**seen, return_dict=True) for model in (theirs, ours))
    assert_close(found.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)
    labels = inputs["input_ids"] if not ours.config.is_encoder_decoder else torch.tensor([[7, 9, 30]])
    assert_close(ours(**inputs, labels=labels).loss, theirs(**inputs, labels=labels).loss, atol=1e-4, rtol=1e-4)


def test_the_q_former_by_itself(published):
    (theirs, its), (ours, _), _ = published
    inputs = its(text=PROMPTS[0], return_tensors="pt")
    ids, width = inputs["qformer_input_ids"], theirs.config.vision_config.hidden_size
    patches = torch.randn(1, 7, width)
    given = {"input_ids": ids, "query_embeds": theirs.query_tokens.detach(), "encoder_hidden_states": patches}
    number = theirs.config.num_query_tokens + ids.shape[1]
    mask = torch.ones(1, number, dtype=torch.long)
    mask[0, -2] = 0
    expected, found = (model.qformer(**given, attention_mask=mask) for model in (theirs, ours))
    assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)


def test_names_and_configuration(published):
    (theirs, _), (ours, _), folder = published
    theirs_state, state = theirs.state_dict(), ours.state_dict()
    assert state.keys() == theirs_state.keys()
    assert all(torch.equal(state[name], value) for name, value in theirs_state.items())
    trained = [name for name, _ in theirs.named_parameters() if "language_model" not in name]
    assert [name for name, _ in ours.named_parameters() if "language_model" not in name] == trained
    assert isinstance(ours.config, InstructBlipConfig)
    for part in ("vision_config", "qformer_config"):
        its = getattr(theirs.config, part).to_dict()
        own = getattr(ours.config, part).to_dict()
        assert {name: own[name] for name in own.keys() & its.keys() - {"dtype"}} == {
            name: its[name] for name in own.keys() & its.keys() - {"dtype"}
        }
    assert InstructBlipConfig.from_pretrained(folder).model_type == "instructblip"


def test_what_is_saved_is_read_by_both(published, tmp_path):
    (theirs, its), (ours, processor), _ = published
    ours.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = its(images=tiny.picture(1), text=PROMPTS[0], return_tensors="pt")
    expected = theirs.generate(**inputs, max_new_tokens=6)
    reference = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    for model in (reference, again):
        assert model.generate(**inputs, max_new_tokens=6).tolist() == expected.tolist()
    equal(blip2.InstructBlipProcessor.from_pretrained(tmp_path)(text=PROMPTS), processor(text=PROMPTS))
    equal(transformers.InstructBlipProcessor.from_pretrained(tmp_path)(text=PROMPTS), its(text=PROMPTS))
    assert blip2.load(tmp_path).ask(tiny.picture(1), PROMPTS[0], max_new_tokens=5)


def test_a_model_of_a_configuration(published):
    (theirs, its), _, _ = published
    made = InstructBlipForConditionalGeneration(theirs.config)
    made.load_state_dict(theirs.state_dict())
    inputs = its(images=tiny.picture(1), text=PROMPTS[0], return_tensors="pt")
    assert made.generate(**inputs, max_new_tokens=6).tolist() == theirs.generate(**inputs, max_new_tokens=6).tolist()


def test_gradients_reach_the_text_branch(published):
    (_, its), (ours, _), _ = published
    inputs = its(images=tiny.picture(1), text=PROMPTS[0], return_tensors="pt")
    with torch.enable_grad():
        loss = ours(**inputs, labels=inputs["input_ids"] if not ours.config.is_encoder_decoder else torch.tensor([[7]]))
        loss.loss.backward()
    words = ours.qformer.embeddings.word_embeddings.weight
    assert words.grad is not None and words.grad.abs().sum() > 0
    ours.zero_grad()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer_input_ids": None}, "qformer_input_ids are missing"),
        ({"qformer_attention_mask": torch.ones(1, 2)}, r"qformer_attention_mask is \[1, 2\]"),
        ({"qformer_input_ids": torch.tensor([[999]]), "qformer_attention_mask": None}, "contain 999, this Q-Former"),
        ({"qformer_input_ids": torch.ones(3, 5).long(), "qformer_attention_mask": None}, "do not pair up"),
    ],
)
def test_what_the_q_former_cannot_read(published, change, message):
    (_, its), (ours, _), _ = published
    inputs = dict(its(images=[tiny.picture(1)] * 2, text=PROMPTS[0], return_tensors="pt"))
    with pytest.raises(OptionError, match=message):
        ours.generate(**inputs | change)


def test_the_two_kinds_are_kept_apart(published, opt_model):
    with pytest.raises(CheckpointError, match="load it with InstructBlipForConditionalGeneration"):
        Blip2ForConditionalGeneration.from_pretrained(published[2])
    with pytest.raises(CheckpointError, match="load it with Blip2ForConditionalGeneration"):
        InstructBlipForConditionalGeneration.from_pretrained(opt_model)
    with pytest.raises(OptionError, match="give a Blip2Config"):
        Blip2ForConditionalGeneration(InstructBlipConfig())


def test_a_llama_by_itself(published):
    """Logits, what it keeps, and what stands between its layers; step by step it says the same."""
    (theirs, _), (ours, _), _ = published
    if ours.config.is_encoder_decoder:
        pytest.skip("a T5's parts are compared in tests/parity/test_drop_in.py")
    ids = torch.tensor([[2, 9, 33, 12, 50, 7], [2, 8, 44, 3, 9, 11]])
    shown = {"output_attentions": True, "output_hidden_states": True}
    expected, found = (model.language_model(input_ids=ids, **shown) for model in (theirs, ours))
    for name in ("hidden_states", "attentions"):
        assert len(found[name]) == len(expected[name])
        for own, its in zip(found[name], expected[name], strict=True):
            assert_close(own, its, atol=1e-4, rtol=1e-3)
    first = ours.language_model(input_ids=ids[:, :4], use_cache=True)
    then = ours.language_model(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, then.logits], dim=1), expected.logits, atol=1e-4, rtol=1e-3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = ours.language_model(input_ids=ids, attention_mask=mask).logits[0, 2:]
    assert_close(padded, ours.language_model(input_ids=ids[:1, 2:]).logits[0], atol=1e-4, rtol=1e-3)
    loss = ours.language_model(input_ids=ids, labels=ids).loss
    assert_close(loss, theirs.language_model(input_ids=ids, labels=ids).loss, atol=1e-4, rtol=1e-4)


def test_a_token_that_is_added(published, tmp_path):
    """The table grows, and what is saved has its size."""
    _, (_, processor), folder = published
    ours = InstructBlipForConditionalGeneration.from_pretrained(folder)
    number = ours.get_input_embeddings().num_embeddings
    ours.resize_token_embeddings(number + 5)
    inputs = processor(images=tiny.picture(1), text=PROMPTS[0], return_tensors="pt")
    expected = ours.generate(**inputs, max_new_tokens=5)
    ours.save_pretrained(tmp_path)
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == number + 5
    assert again.generate(**inputs, max_new_tokens=5).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", instruct.LANGUAGES)
def test_thirty_of_each(family, tmp_path):
    for seed in range(100, 130):
        theirs, its = instruct.saved(family, seed, tmp_path / str(seed))
        ours = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / str(seed))
        processor = blip2.InstructBlipProcessor.from_pretrained(tmp_path / str(seed))
        for picture, text in zip(pictures(), PROMPTS, strict=True):
            inputs = its(images=picture, text=text, return_tensors="pt")
            equal(processor(images=picture, text=text, return_tensors="pt"), inputs)
            for options in WAYS[:5]:
                expected, found = (model.generate(**inputs, do_sample=False, **options) for model in (theirs, ours))
                assert found.tolist() == expected.tolist(), (family, seed, options)
