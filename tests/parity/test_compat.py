"""The Hugging Face names give what Hugging Face's own classes give: the same tensors, ids, logits, losses, texts."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

from blip2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor
from tests import tiny

LONGEST = 12
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
WAYS = [
    {"max_new_tokens": LONGEST},
    {},
    {"max_length": 60, "min_length": 45},
    {"max_new_tokens": LONGEST, "min_new_tokens": 7},
    {"max_new_tokens": LONGEST, "num_beams": 3},
    {"max_new_tokens": LONGEST, "num_beams": 5, "length_penalty": -1.0},
    {"max_new_tokens": LONGEST, "num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"generation_config": transformers.GenerationConfig(num_beams=3, max_new_tokens=9)},
    {"generation_config": {"num_beams": 3, "max_new_tokens": 9}, "num_return_sequences": 2},
]


def name(options):
    return ", ".join(f"{key}={str(value).splitlines()[0]}" for key, value in options.items()) or "defaults"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def drop_in(pair):
    return Blip2ForConditionalGeneration(copy.deepcopy(pair.ours))  # which is taken apart


@pytest.fixture(scope="session")
def end(pair, their_inputs):
    """The token by which the reference's free answers would end at the most different times."""
    skipped = their_inputs["input_ids"].shape[1] if pair.family == "opt" else 1
    inputs = {"pixel_values": pair.pixels_BCHW, **their_inputs}
    free = pair.theirs.generate(**inputs, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0)[:, skipped:].tolist()
    places = {token: {row.index(token) if token in row else LONGEST for row in free} for row in free for token in row}
    return max(sorted(places), key=lambda token: len(places[token] - {0}))


def reference(pair, end, inputs, options):
    options = dict(options)
    if isinstance(options.get("generation_config"), dict):
        options |= options.pop("generation_config")
    pad = pair.theirs.config.text_config.pad_token_id
    return pair.theirs.generate(**inputs, eos_token_id=end, pad_token_id=pad, **options)


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_the_same_ids(pair, drop_in, end, their_inputs, options):
    inputs = {"pixel_values": pair.pixels_BCHW, **their_inputs}
    ours = drop_in.generate(**inputs, eos_token_id=end, **options)
    assert ours.dtype == torch.int64
    assert ours.tolist() == reference(pair, end, inputs, options).tolist()


def test_the_comparison_is_one(pair, end, their_inputs):
    """Rows end at different times, so that there are end tokens and padding to compare."""
    out = reference(pair, end, {"pixel_values": pair.pixels_BCHW, **their_inputs}, WAYS[0])
    new = out[:, their_inputs["input_ids"].shape[1] if pair.family == "opt" else 1 :].tolist()
    assert len({row.index(end) if end in row else LONGEST for row in new}) > 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "max_new_tokens": LONGEST}], ids=name)
def test_the_same_ids_without_a_prompt(pair, drop_in, end, options):
    language = pair.ours.config.language
    pair.theirs.config.text_config.bos_token_id = language.bos_token_id if pair.family == "opt" else 5
    inputs = {"pixel_values": pair.pixels_BCHW}
    ours = drop_in.generate(**inputs, eos_token_id=end, **options)
    assert ours.tolist() == reference(pair, end, inputs, options).tolist()


def test_the_length_counts_the_prompt(pair, drop_in, end, their_inputs):
    inputs = {"pixel_values": pair.pixels_BCHW, **their_inputs}
    before = their_inputs["input_ids"].shape[1] if pair.family == "opt" else 1
    options = {"max_length": before + 4, "min_length": before + 2}
    ours = drop_in.generate(**inputs, eos_token_id=end, **options)
    assert ours.tolist() == reference(pair, end, inputs, options).tolist()
    assert ours.shape[1] <= before + 4


def test_the_default_length_keeps_within_the_model(pair, drop_in, end):
    if pair.family == "opt":  # it reads 64 tokens
        queries = pair.theirs.config.num_query_tokens
        ids = torch.tensor([[pair.theirs.config.image_token_index] * queries + [2] + [9] * (56 - queries)])
        inputs = {"pixel_values": pair.pixels_BCHW[:1], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ours = drop_in.generate(**inputs, eos_token_id=end, min_new_tokens=1)
        assert ours.tolist() == reference(pair, end, inputs, {"min_new_tokens": 1}).tolist()
        assert ours.shape[1] <= 64


def test_padding_on_the_other_side_changes_nothing(pair, drop_in, end, their_inputs):
    """Unlike the reference, whose answers depend on where the padding is."""
    queries = pair.theirs.config.num_query_tokens
    turned = {}
    for key, values in their_inputs.items():
        order = their_inputs["attention_mask"][:, queries:].argsort(dim=1, descending=pair.family == "opt", stable=True)
        turned[key] = torch.cat([values[:, :queries], values[:, queries:].gather(1, order)], dim=1)
    assert not torch.equal(turned["attention_mask"], their_inputs["attention_mask"])
    options = {"eos_token_id": end, "num_beams": 3, "max_new_tokens": LONGEST}
    skipped = their_inputs["input_ids"].shape[1] if pair.family == "opt" else 1
    one, other = (
        drop_in.generate(pixel_values=pair.pixels_BCHW, **inputs, **options)[:, skipped:].tolist()
        for inputs in (their_inputs, turned)
    )
    assert one == other


def test_the_same_logits(pair, drop_in, their_inputs):
    decoder = {} if pair.family == "opt" else {"decoder_input_ids": torch.tensor([[0, 14, 3, 20]]).expand(3, -1)}
    inputs = {"pixel_values": pair.pixels_BCHW, **their_inputs, **decoder}
    theirs, ours = pair.theirs(**inputs), drop_in(**inputs)
    assert theirs.logits.std() > 0.05
    # Padding between image and text is compared too: it would count in a loss over all ids.
    assert_close(ours.logits, theirs.logits, **TOLERANCE)
    assert ours.loss is None and ours[0] is ours["logits"]


def test_the_same_loss(pair, drop_in, their_inputs):
    if pair.family == "opt":
        labels = their_inputs["input_ids"].masked_fill(their_inputs["attention_mask"] == 0, -100)
    else:
        labels = torch.tensor([[14, 3, 20, 5], [8, 8, -100, -100], [33, 2, 6, -100]])
    inputs = {"pixel_values": pair.pixels_BCHW, **their_inputs, "labels": labels}
    theirs, ours = pair.theirs(**inputs), drop_in(**inputs)
    assert_close(ours.loss, theirs.loss, **TOLERANCE)
    assert_close(ours.logits, theirs.logits, **TOLERANCE)


def test_a_gradient_reaches_the_queries(pair, drop_in, their_inputs):
    labels = their_inputs["input_ids"] if pair.family == "opt" else torch.tensor([[14, 3], [8, 8], [33, 2]])
    with torch.enable_grad():
        drop_in(pixel_values=pair.pixels_BCHW, **their_inputs, labels=labels).loss.backward()
    gradient = drop_in.query_tokens.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0
    drop_in.zero_grad(set_to_none=True)


def test_image_features(pair, drop_in):
    theirs = pair.theirs.get_image_features(pair.pixels_BCHW)
    ours = drop_in.get_image_features(pair.pixels_BCHW)
    assert_close(ours.pooler_output, theirs.pooler_output, **TOLERANCE)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, **TOLERANCE)


def test_the_reference_reads_what_is_saved(pair, drop_in, end, their_inputs, tmp_path):
    drop_in.save_pretrained(tmp_path)
    read = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    options = {"pixel_values": pair.pixels_BCHW, **their_inputs, "max_new_tokens": LONGEST, "eos_token_id": end}
    assert read.generate(**options, pad_token_id=1).tolist() == pair.theirs.generate(**options, pad_token_id=1).tolist()


# ---- retrieval ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def their_texts(matching_pair):
    """Two texts of different length; with an image token the reference cuts off as many ids as there are queries."""
    ids = torch.tensor([[4, 11, 7, 32, 9], [4, 25, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if matching_pair.image_token is not None:
        queries = torch.full((2, 8), matching_pair.image_token)
        ids, mask = torch.cat([queries, ids], 1), torch.cat([torch.ones_like(queries), mask], 1)
    return {"input_ids": ids, "attention_mask": mask}


def test_every_image_with_every_text(matching_pair, their_texts):
    ours = Blip2ForImageTextRetrieval(matching_pair.ours)
    inputs = {"pixel_values": matching_pair.pixels_BCHW, **their_texts}
    theirs, mine = matching_pair.theirs(**inputs), ours(**inputs)
    assert mine.logits_per_image.shape == (3, 2)
    for field in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        assert_close(mine[field], theirs[field], **TOLERANCE)


def test_pairs_by_the_matching_head(matching_pair, their_texts):
    ours = Blip2ForImageTextRetrieval(matching_pair.ours)
    inputs = {"pixel_values": matching_pair.pixels_BCHW[:2], **their_texts, "use_image_text_matching_head": True}
    theirs, mine = matching_pair.theirs(**inputs), ours(**inputs)
    assert theirs.logits_per_image.std() > 0.01
    assert_close(mine.logits_per_image, theirs.logits_per_image, **TOLERANCE)
    assert_close(mine.logits_per_text, theirs.logits_per_text, **TOLERANCE)


def test_the_reference_reads_what_is_saved_of_a_matching_model(matching_pair, their_texts, tmp_path):
    Blip2ForImageTextRetrieval(matching_pair.ours).save_pretrained(tmp_path)
    read = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path).eval()
    inputs = {"pixel_values": matching_pair.pixels_BCHW, **their_texts}
    assert_close(read(**inputs).logits_per_image, matching_pair.theirs(**inputs).logits_per_image, **TOLERANCE)


# ---- processor ----------------------------------------------------------------------------------------

TEXTS = ["Question: how many dogs are there? Answer:", "a photo of", "", "naïve café — 🐕🚗 日本"]


def reference_processor(folder):
    """As the published tokenizers are set, and an OPT's padded where it has to be."""
    processor = transformers.Blip2Processor.from_pretrained(folder)
    processor.tokenizer.pad_token = "<pad>"
    if processor.tokenizer.convert_tokens_to_ids("</s>") == 2:
        processor.tokenizer.padding_side = "left"
    return processor


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 60},
        {"padding": True, "truncation": True, "max_length": 11},
    ],
    ids=name,
)
def test_the_same_tensors(any_model, options):
    pictures = [tiny.picture(seed, size=30 + 2 * seed) for seed in range(4)]
    theirs = reference_processor(any_model)(images=pictures, text=TEXTS, return_tensors="pt", **options)
    ours = Blip2Processor.from_pretrained(any_model)(images=pictures, text=TEXTS, return_tensors="pt", **options)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_length", [None, 7])
def test_the_same_lists_of_one(any_model, text, max_length):
    options = {} if max_length is None else {"max_length": max_length}
    theirs = reference_processor(any_model)(tiny.picture(3), text, **options)
    ours = Blip2Processor.from_pretrained(any_model)(tiny.picture(3), text, **options)
    assert (ours.input_ids, ours.attention_mask) == (theirs.input_ids, theirs.attention_mask)
    assert len(ours.pixel_values) == 1 and (ours.pixel_values[0] == theirs.pixel_values[0]).all()


def test_the_same_texts(any_model):
    theirs, ours = reference_processor(any_model), Blip2Processor.from_pretrained(any_model)
    ids = ours(tiny.picture(1), TEXTS, padding=True, return_tensors="pt").input_ids
    for skip in (True, False):
        assert ours.batch_decode(ids, skip_special_tokens=skip) == theirs.batch_decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids[0], skip_special_tokens=skip) == theirs.decode(ids[0], skip_special_tokens=skip)


def test_either_processor_reads_what_the_other_saved(any_model, tmp_path):
    arguments = {"images": tiny.picture(2), "text": TEXTS[0], "return_tensors": "pt"}
    expected = Blip2Processor.from_pretrained(any_model)(**arguments)
    Blip2Processor.from_pretrained(any_model).save_pretrained(tmp_path / "ours")
    reference_processor(any_model).save_pretrained(tmp_path / "theirs")
    read = [
        transformers.Blip2Processor.from_pretrained(tmp_path / "ours"),
        Blip2Processor.from_pretrained(tmp_path / "ours"),
        Blip2Processor.from_pretrained(tmp_path / "theirs"),
    ]
    for processor in read:
        made = processor(**arguments)
        assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_the_whole_way(any_model):
    """Pictures and questions of different length to texts, the reference's classes beside ours."""
    pictures = [tiny.picture(seed) for seed in range(3)]
    questions = ["Question: how many dogs are there? Answer:", "a photo of", "red"]
    answers = []
    for processor, model in (
        (reference_processor(any_model), transformers.Blip2ForConditionalGeneration.from_pretrained(any_model).eval()),
        (Blip2Processor.from_pretrained(any_model), Blip2ForConditionalGeneration.from_pretrained(any_model)),
    ):
        inputs = processor(images=pictures, text=questions, return_tensors="pt", padding=True)
        for options in ({}, {"num_beams": 3, "max_new_tokens": 8}):
            answers.append(processor.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True))
    assert answers[:2] == answers[2:]
    assert len({*answers[0], *answers[1]}) == 6
