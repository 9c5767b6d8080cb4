"""Where the scores are no numbers, an answer ends with an error that says why, and the others do not notice."""

from __future__ import annotations

import math

import pytest
import torch

from blip2 import native
from blip2.errors import NotFiniteError, OptionError
from blip2.generation import Batch, Engine, GenerateOptions

EOS = 0
WAYS = {
    "greedy": GenerateOptions(max_new_tokens=6),
    "history": GenerateOptions(max_new_tokens=6, repetition_penalty=1.3, no_repeat_ngram_size=3),
    "samples": GenerateOptions(max_new_tokens=6, sample=True, seed=1, top_k=5, top_p=0.9, num_return=2),
    "beams": GenerateOptions(max_new_tokens=6, num_beams=3, num_return=3),
    "beams, filtered": GenerateOptions(max_new_tokens=6, num_beams=2, no_repeat_ngram_size=2, min_new_tokens=2),
}


def plain(answers):
    return [[(answer.tokens, answer.finish_reason) for answer in each] for each in answers]


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [5, EOS, slice(None)])
def test_scores_that_are_no_numbers_end_their_answer_alone(table_language, way, value, token):
    language = table_language(8, seed=3)
    engine = Engine(language, eos_token_ids=[EOS])
    good, bad = language.prompt(1), language.prompt(7)
    expected = plain(engine.generate([good], way))
    language.table_VVV[0, 7, token] = value  # what is read after this prompt, and after nothing else
    batch = Batch(language)
    jobs = [engine.job([prompt], way) for prompt in (good, bad, good)]
    batch.add(jobs)
    while not all(job.is_over for job in jobs):
        batch.step()
    assert plain(jobs[0].answers()) == plain(jobs[2].answers()) == expected
    with pytest.raises(NotFiniteError, match="the scores of the next token are NaN or infinite: numbers overflow"):
        jobs[1].answers()


def test_a_number_that_is_none_later_on(table_language, way):
    language = table_language(8, seed=3)
    language.table_VVV[1:] = math.nan  # from the third token on
    with pytest.raises(NotFiniteError):
        Engine(language, eos_token_ids=[]).generate([language.prompt(1)], way)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_is_a_number(table_language, value):
    language = table_language(8, seed=3)
    engine = Engine(language, eos_token_ids=[EOS], damage=lambda: "some weight holds such values")
    [expected] = engine.score([language.prompt(1)], [[4, 2]])
    language.table_VVV[0, 7, 6] = value
    assert engine.score([language.prompt(1)], [[4, 2]]) == [expected]
    with pytest.raises(NotFiniteError, match="NaN or infinite: some weight holds such values"):
        engine.score([language.prompt(1), language.prompt(7)], [[4, 2], [4, 2]])


def test_the_cause_is_what_was_read_or_an_overflow(table_language):
    language = table_language(8)
    language.table_VVV[:] = math.nan
    engine = Engine(language, eos_token_ids=[EOS])
    read = language.prompt(1, 2)
    read[0] = math.inf
    with pytest.raises(NotFiniteError, match="its input has such values, for example an encoded image; encode"):
        engine.generate([read])
    with pytest.raises(NotFiniteError, match="overflow in float16; load the model in bfloat16 or float32"):
        engine.generate([language.prompt(1).half()])


@pytest.mark.parametrize(
    "way",
    [
        GenerateOptions(max_new_tokens=9, no_repeat_ngram_size=1),
        GenerateOptions(max_new_tokens=9, no_repeat_ngram_size=1, sample=True, seed=0),
        GenerateOptions(max_new_tokens=9, no_repeat_ngram_size=1, min_new_tokens=9, num_beams=2),
    ],
)
def test_when_every_token_is_ruled_out_none_is_written(table_language, way):
    language = table_language(4)
    engine = Engine(language, eos_token_ids=[EOS], suppress_token_ids=[EOS])
    with pytest.raises(OptionError, match="every token is ruled out"):
        engine.generate([language.prompt(1)], way)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_what_is_no_number_leaves_nothing_behind_for_others(language, prompts, monkeypatch, is_dropped):
    """Torch reads the slots beyond a row's end with weight 0, which does not hide a NaN."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    engine = Engine(language, eos_token_ids=[])
    lengths = {5: 20, 2: 18, 0: 16, 1: 14}  # the longest prompt comes first, a short one takes its place
    jobs, expected = [], []
    batch = Batch(language)
    for at, number in lengths.items():
        options = GenerateOptions(max_new_tokens=number, num_beams=3 if at == 0 else 1)
        expected.append(plain(engine.generate([prompts[at]], options)))
        jobs.append(engine.job([prompts[at]], options))
        batch.add([jobs[-1]])
        batch.step()
    batch.step()
    cache = getattr(batch._state, "cache", batch._state)
    with torch.inference_mode():
        for tensor in cache.keys + cache.values:
            tensor[0, :, : int(cache.lengths_B[0])] = math.nan
    if is_dropped:
        batch.drop(jobs[0])
    while not all(job.is_over for job in jobs):
        batch.step()
    assert [plain(job.answers()) for job in jobs[1:]] == expected[1:]
