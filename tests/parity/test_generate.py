"""The same tokens as the reference's ``generate``, and for beams the same scores."""

from __future__ import annotations

import pytest
import torch

from blip2.generation import Engine, GenerateOptions

ENDS = [5, 17, 29, 41]
LONGEST = 12

# Our options; the reference's names for them are below.
WAYS = [
    {},
    {"min_new_tokens": 6},
    *({"num_beams": beams, "length_penalty": penalty} for beams in (3, 5) for penalty in (-1.0, 0.0, 1.0)),
    {"num_beams": 5, "num_return": 5},
    {"num_beams": 3, "num_return": 2, "length_penalty": -1.0, "min_new_tokens": 3},
    {"num_beams": 3, "early_stopping": True, "num_return": 3},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
]
# The reference lets these see the prompt of a decoder-only model, here they see new tokens only: T5 alone.
WAYS_OF_T5 = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_return": 3},
    {"num_beams": 5, "no_repeat_ngram_size": 1, "length_penalty": 0.0, "min_new_tokens": 8},
]


def name(options):
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "greedy"


def reference_texts(pair, their_inputs, options):
    """For each prompt its answers without prompt, end and padding; and their scores (beams)."""
    renamed = {{"num_return": "num_return_sequences"}.get(key, key): value for key, value in options.items()}
    if pair.family == "t5":  # the start token, which the filters would take for a part of the answer
        renamed["suppress_tokens"] = [0]
    out = pair.theirs.generate(
        pixel_values=pair.pixels_BCHW, **their_inputs, max_new_tokens=LONGEST, do_sample=False, eos_token_id=ENDS,
        pad_token_id=pair.theirs.config.text_config.pad_token_id, output_scores=True, return_dict_in_generate=True,
        **renamed,
    )  # fmt: skip
    skipped = their_inputs["input_ids"].shape[1] if pair.family == "opt" else 1
    texts = []
    for tokens in out.sequences[:, skipped:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ENDS), len(tokens))
        texts.append(tokens[:end])
    scores = out.sequences_scores.tolist() if options.get("num_beams", 1) > 1 else None
    each = options.get("num_return", 1)
    return [texts[start : start + each] for start in range(0, len(texts), each)], scores


def check(pair, their_inputs, our_prompts, options):
    expected, scores = reference_texts(pair, their_inputs, options)
    suppressed = [0] if pair.family == "t5" else []
    engine = Engine(pair.ours.language, eos_token_ids=ENDS, suppress_token_ids=suppressed)
    together = engine.generate(our_prompts, GenerateOptions(max_new_tokens=LONGEST, **options))
    assert [[answer.tokens for answer in answers] for answers in together] == expected
    if scores is not None:
        assert [answer.score for answers in together for answer in answers] == pytest.approx(scores, rel=1e-4)
    return expected


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_the_same_tokens(pair, their_inputs, our_prompts, options):
    check(pair, their_inputs, our_prompts, options)


@pytest.mark.parametrize("options", WAYS_OF_T5, ids=name)
def test_the_same_tokens_through_filters(pair, their_inputs, our_prompts, options):
    if pair.family == "t5":
        check(pair, their_inputs, our_prompts, options)


def test_the_comparison_is_one(pair, their_inputs):
    """What the reference answers differs by image, ends at different times, and is not one token over and over."""
    (greedy, _), (beams, _) = (
        reference_texts(pair, their_inputs, {"num_beams": beams, "num_return": beams}) for beams in (1, 5)
    )
    assert len({len(text) for texts in greedy for text in texts}) > 1
    flat = [tuple(text) for texts in beams for text in texts]
    assert len(set(flat)) == len(flat) == 15
    assert len({len(text) for text in flat}) > 2
    assert len({token for texts in greedy + beams for text in texts for token in text}) > 8


def test_one_picture_without_a_question(pair, texts, our_prompts):
    """The reference makes the prompt itself: image tokens and its bos."""
    bos = texts[0][0]
    pair.theirs.config.text_config.bos_token_id = bos
    tokens = pair.theirs.generate(pixel_values=pair.pixels_BCHW[:1], max_new_tokens=LONGEST, eos_token_id=ENDS)[0]
    skipped = pair.theirs.config.num_query_tokens + 1 if pair.family == "opt" else 1
    tokens = tokens[skipped:].tolist()
    engine = Engine(pair.ours.language, eos_token_ids=ENDS)
    ((answer,),) = engine.generate(our_prompts[:1], GenerateOptions(max_new_tokens=LONGEST))
    assert tokens == answer.tokens or (tokens[:-1] == answer.tokens and tokens[-1] in ENDS)


def test_bf16_takes_the_same_path(pair, our_prompts):
    """No comparison of tokens, which may tie in bf16: the scores stay near those of fp32."""
    tokens = [[7, 9, 33], [12, 8], [50, 50, 3, 6]]
    exact = Engine(pair.ours.language, eos_token_ids=ENDS).score(our_prompts, tokens)
    language = type(pair.ours.language)(pair.ours.config.language).bfloat16().eval()
    language.load_state_dict(pair.ours.language.state_dict())
    rough = Engine(language, eos_token_ids=ENDS).score([prompt.bfloat16() for prompt in our_prompts], tokens)
    torch.testing.assert_close(torch.tensor(rough), torch.tensor(exact), atol=0.5, rtol=0.05)
