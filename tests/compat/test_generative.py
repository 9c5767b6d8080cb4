"""The generative model behind Hugging Face's arguments: no image is ignored, options are heeded or refused. Equality
with the reference's results is tested in tests/parity."""

from __future__ import annotations

import copy
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch

from blip2 import Blip2ForConditionalGeneration, Blip2Processor, checkpoint
from blip2.errors import NotFiniteError, OptionError
from tests import tiny

QUERIES = 4
TEXTS = ["Question: how many dogs are there? Answer:", "a photo", "red"]


@pytest.fixture(scope="module")
def model(any_model):
    return Blip2ForConditionalGeneration.from_pretrained(any_model)


@pytest.fixture(scope="module")
def processor(any_model):
    return Blip2Processor.from_pretrained(any_model)


@pytest.fixture
def inputs(processor):
    pictures = [tiny.picture(seed) for seed in range(3)]
    return processor(images=pictures, text=TEXTS, return_tensors="pt", padding=True)


def new_tokens(model, out, inputs):
    return out[:, inputs["input_ids"].shape[1] if not model.config.language.has_encoder else 1 :].tolist()


def trimmed(row, pad):
    return [token for token in row if token != pad]


def test_rows_alone_and_in_company(model, processor, inputs):
    pad = model.config.language.pad_token_id
    together = new_tokens(model, model.generate(**inputs), inputs)
    for seed, text in enumerate(TEXTS):
        one = processor(tiny.picture(seed), text, return_tensors="pt")
        (alone,) = new_tokens(model, model.generate(**one), one)
        assert trimmed(alone, pad) == trimmed(together[seed], pad)
    assert len({tuple(row) for row in together}) == 3


def test_one_image_with_many_texts_and_one_text_with_many_images(model, processor):
    pictures = [tiny.picture(seed) for seed in range(3)]
    for images, texts in (([pictures[0]], TEXTS), (pictures, TEXTS[:1])):
        few = processor(images=images, text=texts, return_tensors="pt", padding=True)
        many = processor(
            images=images * (3 // len(images)), text=texts * (3 // len(texts)), return_tensors="pt", padding=True
        )
        assert torch.equal(model.generate(**few), model.generate(**many))


def test_the_prompt_comes_back_from_an_opt_only(model, inputs):
    out = model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2)
    if not model.config.language.has_encoder:
        assert torch.equal(out[::2, :-2], inputs.input_ids) and torch.equal(out[1::2, :-2], inputs.input_ids)
    else:
        assert out[:, 0].tolist() == [model.config.language.decoder_start_token_id] * 6
    out[out == 0] = 1  # programs do write into it


def test_the_legacy_form_without_image_token(model, any_model, inputs, processor):
    """An old revision: ids are text alone, the image goes before them, and the answers are the same."""
    old = checkpoint.load(any_model)
    old.config = replace(old.config, image_token_id=None)
    legacy = Blip2ForConditionalGeneration(old)
    text = processor(text=TEXTS, return_tensors="pt", padding=True)
    out = legacy.generate(pixel_values=inputs.pixel_values, **text)
    assert new_tokens(legacy, out, text) == new_tokens(model, model.generate(**inputs), inputs)
    if not model.config.language.has_encoder:
        assert torch.equal(out[:, : text.input_ids.shape[1]], text.input_ids)
    alone = {"input_ids": torch.empty(1, 1)}, {"input_ids": torch.empty(1, QUERIES + 1)}
    pixels = inputs.pixel_values
    assert new_tokens(legacy, legacy.generate(pixels), alone[0]) == new_tokens(model, model.generate(pixels), alone[1])


class Stream:
    def put(self, ids): ...

    def end(self): ...


def changed(inputs, **values):
    return {**inputs, **values}


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_an_image_is_never_ignored(model, processor, inputs, call):
    run = getattr(model, call)
    without = processor(text=TEXTS, return_tensors="pt", padding=True)
    with pytest.raises(OptionError, match=rf"row 0 of input_ids has 0 image tokens .* needs {QUERIES}"):
        run(pixel_values=inputs.pixel_values, **without)
    fewer = inputs.input_ids.clone()
    fewer[2, 0] = 9
    with pytest.raises(OptionError, match=f"row 2 of input_ids has {QUERIES - 1} image tokens"):
        run(**changed(inputs, input_ids=fewer))
    twice = torch.cat([inputs.input_ids[:, :QUERIES], inputs.input_ids], dim=1)
    with pytest.raises(OptionError, match=f"has {2 * QUERIES} image tokens"):
        run(**changed(inputs, input_ids=twice, attention_mask=torch.ones_like(twice)))
    half = torch.ones_like(twice)
    half[:, :QUERIES] = 0
    with pytest.raises(OptionError, match="attention_mask masks image tokens"):
        run(**changed(inputs, input_ids=twice, attention_mask=half))
    hidden = inputs.attention_mask.clone()
    hidden[1, 1] = 0
    with pytest.raises(OptionError, match=f"row 1 of input_ids has {QUERIES - 1} image tokens .* attention_mask"):
        run(**changed(inputs, attention_mask=hidden))
    with pytest.raises(OptionError, match="3 images and 2 texts"):
        run(**changed(inputs, input_ids=inputs.input_ids[:2], attention_mask=inputs.attention_mask[:2]))


def test_inputs_that_do_not_belong_to_the_model(model, inputs):
    with pytest.raises(OptionError, match="padding token"):
        model.generate(inputs.pixel_values, inputs.input_ids)
    with pytest.raises(OptionError, match="attention_mask is"):
        model.generate(**changed(inputs, attention_mask=inputs.attention_mask[:, 1:]))
    strange = inputs.input_ids.clone()
    strange[0, -1] = 5000
    with pytest.raises(OptionError, match="contain 5000"):
        model.generate(**changed(inputs, input_ids=strange))
    with pytest.raises(OptionError, match=r"\[images, 3, 32, 32\]"):
        model.generate(inputs.pixel_values[0])
    larger = torch.rand(3, 3, 64, 48)
    with pytest.raises(OptionError, match="interpolate_pos_encoding=True"):
        model.generate(**changed(inputs, pixel_values=larger))
    assert len(model.generate(**changed(inputs, pixel_values=larger), interpolate_pos_encoding=True)) == 3


def test_sampling_draws_from_torch(model, inputs):
    options = {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "num_return_sequences": 2}
    torch.manual_seed(3)
    first = model.generate(**inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**inputs, **options), first) and len(first) == 6
    assert not torch.equal(model.generate(**inputs, **options), first)


def test_sampling_options_without_sampling_are_passed_over_with_a_warning(model, inputs):
    with pytest.warns(UserWarning, match="top_p has no effect without do_sample"):
        out = model.generate(**inputs, do_sample=False, num_beams=2, top_p=0.9, temperature=1)
    assert torch.equal(out, model.generate(**inputs, num_beams=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences is 2, but 1 beam"),
        ({"do_sample": True, "num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, but 2 beam"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_length": 1}, "give max_new_tokens instead"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9"),
        ({"eos_token_id": [5, "6"]}, "eos_token_id is .*a token id or a list"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 2, "num_beam_groups": 2}, "num_beam_groups is for a decoding strategy that is not supported"),
        ({"generation_config": {"penalty_alpha": 0.6}}, "penalty_alpha is for"),
        ({"cache_implementation": "quantized"}, "would change the answers"),
        ({"stop_strings": ["a"]}, "give tokenizer=processor.tokenizer"),
        ({"streamer": io.StringIO()}, r"put\(ids\) and end\(\)"),
        ({"streamer": Stream(), "num_beams": 2}, "set num_beams=1"),
        ({"bad_words_ids": [5]}, "list of lists"),
        ({"suppress_tokens": [5000]}, "suppress_tokens"),
        ({"logits_processor": ["a"]}, "logits_processor holds 'a'"),
        ({"logits_processor": lambda ids, scores: torch.full_like(scores, float("-inf"))}, "every token is ruled out"),
        ({"logits_processor": lambda ids, scores: scores * float("nan")}, "returns NaN scores"),
    ],
)
def test_options_that_are_not_possible(model, inputs, options, message):
    with pytest.raises(OptionError, match=message):
        model.generate(**inputs, **options)


def test_what_would_only_be_faster_or_is_not_read_changes_nothing(model, inputs):
    plain = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, assistant_model=model, prompt_lookup_num_tokens=2), plain)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", low_memory=True), plain)
    with pytest.warns(UserWarning, match="encoder_repetition_penalty has no effect"):
        assert torch.equal(model.generate(**inputs, encoder_repetition_penalty=1.5), plain)


@pytest.mark.parametrize("beams", [1, 2])
def test_scores_that_are_no_numbers(model, inputs, beams, monkeypatch):
    step = model.model.language.step
    monkeypatch.setattr(model.model.language, "step", lambda tokens, state: step(tokens, state) * float("nan"))
    with pytest.raises(NotFiniteError, match="NaN or infinite: "):
        model.generate(**inputs, num_beams=beams, repetition_penalty=1.2)


def test_options_that_do_not_exist(model, inputs):
    with pytest.raises(TypeError, match=r"'num_beems'; it takes .*num_beams"):
        model.generate(**inputs, num_beems=3)
    with pytest.raises(TypeError, match=r"generation_config has no argument 'num_beems'"):
        model.generate(**inputs, generation_config={"num_beems": 6})


def test_the_settings_of_the_folder_hold_until_others_are_given(model, any_model, inputs, tmp_path):
    shutil.copytree(any_model, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 3, "max_new_tokens": 4}))
    other = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(other.generate(**inputs), model.generate(**inputs, num_beams=3, max_new_tokens=4))
    assert torch.equal(other.generate(**inputs, num_beams=1, max_new_tokens=20), model.generate(**inputs))
    longer = inputs.input_ids.shape[1] + 6 if not model.config.language.has_encoder else 7
    expected = model.generate(**inputs, num_beams=3, max_new_tokens=6)
    assert torch.equal(other.generate(**inputs, max_length=longer), expected), "the other name for the same thing"
    other.save_pretrained(tmp_path / "again")
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(**inputs), other.generate(**inputs))


def test_settings_are_attributes_and_entries(model, inputs):
    expected = model.generate(**inputs, num_beams=3, max_new_tokens=4)
    model.generation_config.max_new_tokens = 4
    model.generation_config.update(num_beams=3, max_new_tokens=9, defaults_only=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**inputs, labels=inputs["input_ids"]), expected), "labels change nothing"
    assert twin.generation_config.max_new_tokens == 4 == twin.generation_config["max_new_tokens"]
    assert twin.generation_config.top_k is None
    twin.generation_config.num_beems = 3
    with pytest.raises(TypeError, match=r"generation_config has no argument 'num_beems'"):
        twin.generate(**inputs)


def test_labels_are_needed_where_a_decoder_has_nothing_to_read(model, inputs):
    if model.config.language.family == "t5":
        with pytest.raises(OptionError, match="give them, or labels"):
            model(**inputs)
    else:
        with pytest.raises(OptionError, match="decoder_input_ids are only for a T5"):
            model(**inputs, decoder_input_ids=inputs.input_ids)


def test_logits_of_a_row_do_not_depend_on_its_padding(model, processor, inputs):
    if not model.config.language.has_encoder:
        with torch.no_grad():
            together = model(**inputs).logits[1][inputs.attention_mask[1].bool()]
            alone = model(**processor(tiny.picture(1), TEXTS[1], return_tensors="pt")).logits[0]
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_padding_before_everything_sees_nothing_and_harms_nothing(model, inputs):
    if not model.config.language.has_encoder:
        ids = torch.nn.functional.pad(inputs.input_ids, (2, 0), value=model.config.language.pad_token_id)
        mask = torch.nn.functional.pad(inputs.attention_mask, (2, 0))
        expected, logits = model(**inputs).logits, model(inputs.pixel_values, ids, mask).logits
        assert logits.isfinite().all()
        real = inputs.attention_mask.bool()
        torch.testing.assert_close(logits[:, 2:][real], expected[real], atol=1e-5, rtol=0)


def test_another_precision_is_the_one_that_loading_gives(model, any_model, inputs):
    assert model.to("cpu") is model and model.to(torch.float32) is model
    assert model.to("cpu", torch.float32) is model and model.to(device="cpu") is model and model.eval() is model
    loaded = Blip2ForConditionalGeneration.from_pretrained(any_model, dtype=torch.bfloat16)
    cast = Blip2ForConditionalGeneration.from_pretrained(any_model).bfloat16()
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert {name: parameter.dtype for name, parameter in cast.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16} and cast.dtype == torch.bfloat16
    assert torch.equal(cast.generate(**inputs), loaded.generate(**inputs))
    assert cast.float().dtype == torch.float32


def test_float16_is_refused_where_it_gives_nonsense(model, any_model):
    with pytest.raises(OptionError, match="use bfloat16"):
        model.half()
    with pytest.raises(OptionError, match="quantised model cannot be cast"):
        Blip2ForConditionalGeneration.from_pretrained(any_model, load_in_8bit=True).to(torch.bfloat16)


def test_no_answer_is_made_of_what_is_no_number(any_model, inputs):
    model = Blip2ForConditionalGeneration.from_pretrained(any_model)
    model.model.projection.bias.data[0] = float("nan")
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        with pytest.raises(NotFiniteError, match=r"projection.bias .in files: language_projection.bias. has such"):
            model.generate(**inputs, **options)
    labels = torch.tensor([[5, 6, 7]] * 3)
    assert model(**inputs, labels=labels).loss.isnan()  # as torch has it
