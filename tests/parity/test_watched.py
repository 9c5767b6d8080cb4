"""``generate`` with all that changes or watches the scores: the ids, scores and calls are the reference's."""

from __future__ import annotations

import threading
from copy import deepcopy

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import MaxLengthCriteria, StoppingCriteria, TextIteratorStreamer

from blip2 import Blip2ForConditionalGeneration, Blip2Processor
from tests import tiny

BAD = [[9], [44, 8], [2, 9], [12], [33, 50]]
WAYS = [
    {},
    {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": -1.0},
    {"eos_token_id": [7, 12, 20]},
    {"eos_token_id": [7, 12, 20], "num_beams": 3},
    {"eos_token_id": -1, "min_new_tokens": 5},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.7, "num_beams": 3},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1, "num_beams": 2},
    {"bad_words_ids": BAD},
    {"bad_words_ids": BAD, "num_beams": 2},
    {"sequence_bias": [[[9], 2.0], [[44, 8], -3.0]]},
    {"suppress_tokens": [3, 9, 12, 44]},
    {"begin_suppress_tokens": [3, 9, 12, 44], "forced_bos_token_id": 6},
    {"forced_eos_token_id": [5, 6], "num_beams": 3},
    {"exponential_decay_length_penalty": (3, 1.4), "num_beams": 2},
    {"renormalize_logits": True, "repetition_penalty": 1.2, "min_new_tokens": 5},
    {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 20, 10 + row, 30, 45], "num_beams": 2},
    {"stopping_criteria": [MaxLengthCriteria(max_length=42)]},
    {"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(2.0)], "repetition_penalty": 1.3},
    {"max_time": 0.0},
    {"cache_implementation": "static", "num_beam_groups": 1, "synced_gpus": False, "penalty_alpha": None},
    {"do_sample": True},
    {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "temperature": 1.5},
    {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "top_p": 0.7, "temperature": 1.4},
    {"do_sample": True, "num_beams": 2, "top_k": 0, "typical_p": 0.5, "eta_cutoff": 0.03},
    {"do_sample": True, "top_k": 0, "min_p": 0.1, "epsilon_cutoff": 0.02},
]  # fmt: skip
TWO = ["opt, 3 queries", "t5, 8 queries, heads wider, tanh GELU"]
two_pairs = pytest.mark.parametrize("pair", TWO, indirect=True)


def name(options):
    shown = {key: "..." if " at 0x" in str(value) else value for key, value in options.items()}  # no addresses
    return ", ".join(f"{key}={value}" for key, value in shown.items()) or "defaults"


@pytest.fixture(scope="session")
def inputs(pair, their_inputs):
    return {"pixel_values": pair.pixels_BCHW, **their_inputs}


@pytest.fixture(scope="session")
def drop_in(pair):
    return Blip2ForConditionalGeneration(deepcopy(pair.ours))  # which takes its layers apart


def both(pair, drop_in, inputs, **options):
    """What either writes, from the same random numbers."""
    options = {"max_new_tokens": 9, "eos_token_id": 7} | options
    answers = []
    for model, more in ((pair.theirs, {"pad_token_id": pair.theirs.config.text_config.pad_token_id}), (drop_in, {})):
        torch.manual_seed(5)
        answers.append(model.generate(**inputs, **options, **more))
    return answers


def same(theirs, ours):
    """Class, names and values of two outputs."""
    assert type(ours).__name__ == type(theirs).__name__
    kept = [key for key in theirs if key != "past_key_values"]
    assert {"sequences", "scores", "logits"} <= set(kept)
    for key in kept:
        assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-4)


@two_pairs
@pytest.mark.parametrize("options", WAYS, ids=name)
@pytest.mark.filterwarnings("ignore")
def test_the_same_ids_and_scores(pair, drop_in, inputs, options):
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(pair, drop_in, inputs, **options, **kept)
    same(theirs, ours)
    indices = {} if theirs.get("beam_indices") is None else {"beam_indices": theirs.beam_indices}
    for normalize in (True, False):
        scores = [
            model.compute_transition_scores(out.sequences, out.scores, normalize_logits=normalize, **indices)
            for model, out in ((pair.theirs, theirs), (drop_in, ours))
        ]
        assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_options_make_a_difference(pair, drop_in, inputs):
    """So that the comparison above is one."""
    plain = drop_in.generate(**inputs, max_new_tokens=9, eos_token_id=7).tolist()
    for options in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [plain[0][-1]]}):
        assert drop_in.generate(**inputs, max_new_tokens=9, eos_token_id=7, **options).tolist() != plain


@two_pairs
def test_the_engine_and_the_lockstep_write_the_same(drop_in, inputs):
    """With nothing to watch the engine writes; with a processor that changes nothing, all rows go together."""
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "early_stopping": True}):
        options |= {"max_new_tokens": 9, "eos_token_id": 7}
        watched = drop_in.generate(**inputs, **options, logits_processor=lambda ids, scores: scores)
        assert watched.tolist() == drop_in.generate(**inputs, **options).tolist()


class Watcher(StoppingCriteria):
    """A processor and a criterion that note what they see, and change the answers."""

    def __init__(self):
        self.seen = []

    def process(self, ids, scores):
        self.seen.append(ids.tolist())
        return scores - 0.3 * torch.nn.functional.one_hot(ids.sum(1) % scores.shape[1], scores.shape[1])

    def __call__(self, ids, scores, **_):
        self.seen.append((ids.tolist(), None if scores is None else len(scores)))
        return ids.sum(1) % 11 == 0

    def __len__(self):
        return 0  # as a queue that is empty at first: it is heeded all the same

    def put(self, ids):
        self.seen.append(("put", ids.tolist()))

    def end(self):
        self.seen.append("end")


@two_pairs
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"return_dict_in_generate": True, "output_scores": True}],
    ids=name,
)
def test_processors_criteria_and_streamers_see_the_same(pair, drop_in, inputs, options):
    seen, ids = [], []
    for model, more in ((pair.theirs, {"pad_token_id": pair.theirs.config.text_config.pad_token_id}), (drop_in, {})):
        watcher = Watcher()
        streamer = {} if options.get("num_beams") else {"streamer": watcher}
        out = model.generate(
            **inputs, **more, **options, **streamer, max_new_tokens=9, eos_token_id=7, stopping_criteria=[watcher],
            logits_processor=[watcher.process],
        )  # fmt: skip
        seen.append(watcher.seen)
        ids.append((out if torch.is_tensor(out) else out.sequences).tolist())
    assert seen[1] == seen[0] and len(seen[0]) > 4
    assert ids[1] == ids[0]


@two_pairs
def test_embedded_prompts(pair, drop_in, inputs):
    """Ids that are vectors already: the answers of the ids; from an OPT the new tokens alone, as there are no ids."""
    vectors = pair.theirs.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {key: inputs[key] for key in ("pixel_values", "attention_mask")} | {"inputs_embeds": vectors}
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for options in ({}, {"num_beams": 2, "repetition_penalty": 1.4}, {"max_new_tokens": None, "max_length": 50}):
        same(*both(pair, drop_in, embedded, **options, **kept))
    same(*both(pair, drop_in, inputs | {"inputs_embeds": vectors * 1.1}, **kept))
    ids = drop_in.generate(**inputs, max_new_tokens=5)
    of_vectors = drop_in.generate(**embedded, max_new_tokens=5)
    assert torch.equal(of_vectors, ids[:, inputs["input_ids"].shape[1] :] if pair.family == "opt" else ids)


@pytest.fixture(scope="module")
def readers(any_model):
    """Either model with a tokenizer, the words that both are to write in, and what they read."""
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(any_model).eval()
    processor = Blip2Processor.from_pretrained(any_model)
    words = sorted(set(processor.tokenizer(" two dogs and a red car on the left", add_special_tokens=False).input_ids))
    options = {
        **processor(tiny.picture(2), "a photo of", return_tensors="pt"),
        "prefix_allowed_tokens_fn": lambda row, ids: words,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "repetition_penalty": 1.5,
        "max_new_tokens": 12,
    }
    ours = Blip2ForConditionalGeneration.from_pretrained(any_model), processor.tokenizer
    return (theirs, transformers.AutoTokenizer.from_pretrained(any_model)), ours, options


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(readers, beams):
    (theirs, their_tokenizer), (ours, tokenizer), options = readers
    options = options | {"num_beams": beams}
    plain = ours.generate(**options)[0].tolist()
    stops = [tokenizer.decode(plain[-7:-5]).strip()[1:], "no such text"]  # of two tokens, from within the first
    found = ours.generate(**options, stop_strings=stops, tokenizer=tokenizer)
    assert stops[0] in tokenizer.decode(found[0]) and stops[0] not in tokenizer.decode(found[0, :-1])
    assert ours.generate(**options, stop_strings=stops[0], tokenizer=their_tokenizer).tolist() == found.tolist()
    if len(tokenizer) > 200:  # the reference needs a vocabulary that can write "abcdef"
        expected = theirs.generate(**options, stop_strings=stops, tokenizer=their_tokenizer)
        assert found.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore")
def test_text_streamers(readers):
    """The reference's streamer, which reads with the tokenizer that it is given."""
    texts = []
    for model, tokenizer in readers[:2]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
        thread = threading.Thread(target=model.generate, kwargs={**readers[2], "streamer": streamer})
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1] and len("".join(texts[1])) > 12


@pytest.fixture
def eager(pair):
    """The reference in the one way of attention that tells its weights."""
    pair.theirs.set_attn_implementation("eager")
    yield
    pair.theirs.set_attn_implementation("sdpa")


@two_pairs
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=name)
def test_attentions_and_hidden_states(pair, drop_in, inputs, options):
    """Of each step, in the reference's shapes; an OPT's padding sees what it likes, and nothing sees it."""
    kept = dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"), True
    )
    theirs, ours = both(pair, drop_in, inputs, max_new_tokens=4, **options, **kept)
    assert [key for key in theirs if key != "past_key_values"] == list(ours)
    is_real_BS = inputs["attention_mask"].bool()
    for key in [key for key in ours if key.endswith(("attentions", "hidden_states"))]:
        one, other = theirs[key], ours[key]
        if key.startswith("encoder"):
            one, other = [one], [other]
        assert len(one) == len(other) >= 1
        for step, its in zip(one, other, strict=True):
            assert len(step) == len(its) > 0
            for layer, same_layer in zip(step, its, strict=True):
                assert layer.shape == same_layer.shape
                if layer.shape[-2] == is_real_BS.shape[1]:  # rows of the prompt, of which padding is left out
                    real_RS = is_real_BS.repeat_interleave(len(layer) // len(is_real_BS), dim=0)
                    layer, same_layer = (
                        each[real_RS] if each.dim() == 3 else each.transpose(1, 2)[real_RS]
                        for each in (layer, same_layer)
                    )
                assert_close(same_layer, layer, atol=1e-4, rtol=1e-3)
