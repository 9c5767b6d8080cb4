"""InstructBLIP, whose Q-Former reads the prompt: the reference's pixels, ids, logits and tokens."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import blip2
from blip2 import checkpoint
from blip2.errors import CheckpointError, OptionError
from blip2.language import pad_rows
from blip2.quantized import QuantizedLinear
from tests import tiny

transformers = pytest.importorskip("transformers")

from tests.parity import instruct  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

PROMPTS = [
    "how many dogs are there?",
    "Question: what colour is the car? Short answer:",
    "a",
    "a photo of two dogs and a red car on green, and where is it?",
]
WAYS = [{"num_beams": 1}, {"num_beams": 5}, {"num_beams": 5, "length_penalty": -1.0}]
LONGEST = 10
TOLERANCE = 1e-4


def pictures():
    return [tiny.picture(seed) for seed in range(len(PROMPTS))]


@torch.inference_mode()
def difference(theirs, processor, blip):
    """The largest, of the image's vectors and of the logits that follow a prompt; pixels and ids are equal."""
    worst, speaker = 0.0, blip.speaker
    seen = blip.encode(pictures())
    prompts = [speaker.prompt(image, text, LONGEST) for image, text in zip(seen, PROMPTS, strict=True)]
    logits_BV, _ = speaker.model.language.prefill(*pad_rows(prompts), LONGEST)
    for picture, text, prompt_TD, logits_V in zip(pictures(), PROMPTS, prompts, logits_BV, strict=True):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        torch.testing.assert_close(blip.frontend.pixels(picture)[None], inputs["pixel_values"], atol=1e-6, rtol=0)
        assert speaker.instruction(text) == inputs["qformer_input_ids"][0].tolist()
        queries = theirs.config.num_query_tokens
        ids = speaker.tokenizer.prompt_ids(text, speaker.model.config.language)
        assert ids == inputs["input_ids"][0, queries:].tolist()
        decoded = {"decoder_input_ids": torch.tensor([[0]])} if speaker.model.config.language.has_encoder else {}
        expected = theirs(**inputs, **decoded)
        features_QD = theirs.get_image_features(
            inputs["pixel_values"], inputs["qformer_input_ids"], inputs["qformer_attention_mask"], return_dict=True
        ).pooler_output[0]
        for own, its in ((prompt_TD[:queries], features_QD), (logits_V, expected.logits[0, -1])):
            worst = max(worst, ((own - its).abs().max() / its.abs().max().clamp(min=1)).item())
    return worst


def tokens(theirs, processor, blip, options):
    """The reference's answers to each pair alone; ours to each alone, and to all together."""
    # That the image token is never written is our own.
    suppressed = {"suppress_tokens": [theirs.config.image_token_index]}
    given = {"max_new_tokens": LONGEST, "min_new_tokens": 0, "repetition_penalty": 1.0, **options}
    expected = []
    for picture, text in zip(pictures(), PROMPTS, strict=True):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        out = theirs.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, **suppressed, **options)[0].tolist()
        out = out[1:] if blip.speaker.model.config.language.has_encoder else out[inputs["input_ids"].shape[1] :]
        ends = blip.speaker.model.config.language.end_token_ids
        expected.append(out[: next((place for place, token in enumerate(out) if token in ends), len(out))])
    together = [row[0].tokens for row in blip.each_caption(pictures(), prompt=PROMPTS, **given)]
    alone = [
        next(blip.each_caption(picture, prompt=text, **given))[0].tokens
        for picture, text in zip(pictures(), PROMPTS, strict=True)
    ]
    return expected, together, alone


def check(family, seed, folder, ways=WAYS):
    theirs, processor = instruct.saved(family, seed, folder / "theirs")
    blip = blip2.load(folder / "theirs")
    found = difference(theirs, processor, blip)
    assert found < TOLERANCE, (family, seed)
    for options in ways:
        expected, together, alone = tokens(theirs, processor, blip, options)
        assert together == alone == expected, (family, seed, options)
    return found, expected


@pytest.mark.parametrize("family", instruct.LANGUAGES)
def test_the_same_pixels_ids_logits_and_tokens(family, tmp_path):
    check(family, 0, tmp_path, WAYS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("family", instruct.LANGUAGES)
def test_forty_of_each(family, tmp_path):
    found = [check(family, seed, tmp_path / str(seed)) for seed in range(40)]
    distinct = {tuple(answer) for _, answers in found for answer in answers}
    print(f"\n{family}: 40 models, largest difference {max(worst for worst, _ in found):.1e}, distinct {len(distinct)}")
    assert len(distinct) > 80


@pytest.fixture(scope="module", params=instruct.LANGUAGES)
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct")
    theirs, processor = instruct.saved(request.param, 1, folder)
    return theirs, processor, folder


def test_a_picture_is_seen_by_the_question(published):
    """What is kept of it is the same, what the language model is told of it is not."""
    speaker = (blip := blip2.load(published[2])).speaker
    kept = blip.encode(tiny.picture(1))
    assert tuple(kept.queries_QD.shape) == speaker.model.config.kept_shape
    one_QD, other_QD = (speaker.queries(kept, text) for text in PROMPTS[:2])
    assert (one_QD - other_QD).abs().max() > 0.1


def test_the_reference_reads_what_is_saved(published, tmp_path):
    theirs, processor, folder = published
    checkpoint.save(checkpoint.load(folder), tmp_path, tokenizer=folder / "tokenizer.json")
    again = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    its = transformers.InstructBlipProcessor.from_pretrained(tmp_path)
    ours, expected = its(tiny.picture(1), PROMPTS[1]), processor(tiny.picture(1), PROMPTS[1])
    assert all(ours[name] == expected[name] for name in ("input_ids", "qformer_input_ids"))
    first, again = (blip2.load(each).ask(tiny.picture(1), PROMPTS[0], max_new_tokens=9) for each in (folder, tmp_path))
    assert first == again
    assert checkpoint.read_config(tmp_path) == checkpoint.read_config(folder)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_in_8_and_4_bits(published, kind):
    """The language model's weights alone; what it says then is of the weights that the codes stand for."""
    plain, quantized = blip2.load(published[2]), blip2.load(published[2], quantize=kind)
    names = [name for name, each in quantized.speaker.model.named_modules() if isinstance(each, QuantizedLinear)]
    assert names and all(name.startswith("language.") for name in names)
    model = plain.speaker.model
    for name in names:
        weight = quantized.speaker.model.get_submodule(name).dequantized()
        model.get_submodule(name).weight = torch.nn.Parameter(weight)
    ranked = [blip.rank(tiny.picture(1), PROMPTS[0], ["two", "red"]) for blip in (plain, quantized)]
    scores = [torch.tensor([choice.score for choice in sorted(row, key=lambda each: each.text)]) for row in ranked]
    torch.testing.assert_close(*scores, atol=2e-2, rtol=1e-3)


@torch.inference_mode()
def test_choices_have_the_reference_s_likelihoods(published):
    theirs, processor, folder = published
    blip = blip2.load(folder)
    found = {choice.text: choice.score for choice in blip.rank(tiny.picture(2), PROMPTS[0], ["two", "a red car"])}
    for text, score in found.items():
        inputs = processor(images=tiny.picture(2), text=PROMPTS[0], return_tensors="pt")
        answer = torch.tensor([blip.speaker.tokenizer.answer_ids(text, blip.speaker.model.config.language)])
        if blip.speaker.model.config.language.has_encoder:
            logits = theirs(**inputs, decoder_input_ids=torch.cat([torch.tensor([[0]]), answer[:, :-1]], 1)).logits
        else:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            logits = theirs(**inputs).logits[:, -answer.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(2, answer[..., None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-3)


def test_of_a_long_prompt_the_q_former_reads_the_end(published):
    _, processor, folder = published
    blip = blip2.load(folder)
    text = "is there a cat? " * 40 + "how many dogs?"
    expected = processor(text=text, truncation=True, max_length=128)["qformer_input_ids"][0]
    assert len(expected) == 128 and blip.speaker.instruction(text) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="blip-2"), "is missing|are missing|unexpected"),
        (lambda c: c["qformer_config"].update(vocab_size=77), "embeddings.word_embeddings.weight has shape"),
        (lambda c: c.update(model_type="instructblipvideo"), "not 'blip-2' or 'instructblip'"),
    ],
)
def test_what_does_not_fit(published, tmp_path, change, message):
    folder = published[2]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        blip2.load(tmp_path)


def test_without_the_tokenizer_of_the_q_former(published, tmp_path):
    for file in published[2].iterdir():
        if file.name != checkpoint.QFORMER_TOKENIZER:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"qformer_tokenizer/tokenizer.json: no such file"):
        blip2.load(tmp_path)


def test_a_blip2_that_writes_reads_no_prompt(tmp_path):
    folder = tiny.save_generative("opt", tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["qformer_config"]["use_qformer_text_input"] = True
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="set model_type to 'instructblip'"):
        blip2.load(folder)


def test_it_writes_and_does_not_compare(published):
    from blip2.api.loading import as_matcher

    blip = blip2.load(published[2])
    with pytest.raises(CheckpointError, match="cannot compare images with texts"):
        as_matcher(blip)
    with pytest.raises(OptionError, match="the question is empty"):
        blip.ask(tiny.picture(1), " ")
