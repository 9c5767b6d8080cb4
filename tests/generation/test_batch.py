"""Requests that come and go while others are written: nobody's answer changes, and rows are freed at once."""

import random
from dataclasses import replace

import pytest

from blip2.generation import Batch, Engine, GenerateOptions

ENDS = [0, 9, 28, 37]
WAYS = (
    GenerateOptions(max_new_tokens=12),
    GenerateOptions(max_new_tokens=7, min_new_tokens=4, repetition_penalty=1.5, no_repeat_ngram_size=2),
    GenerateOptions(max_new_tokens=12, num_beams=4, num_return=2),
    GenerateOptions(max_new_tokens=9, num_beams=3, early_stopping=True, length_penalty=-1.0),
    GenerateOptions(max_new_tokens=12, sample=True, seed=4, temperature=1.3, top_k=12, top_p=0.9, num_return=3),
    GenerateOptions(max_new_tokens=3, sample=True, seed=1, min_p=0.05, typical_p=0.8),
)


@pytest.fixture
def engine(language):
    return Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])


def plain(answers):
    return [[(answer.tokens, answer.finish_reason) for answer in each] for each in answers]


@pytest.mark.parametrize("seed", range(6))
def test_whoever_comes_and_goes_the_answers_are_those_alone(engine, prompts, seed):
    """Jobs of every kind enter a running batch at random steps, some are dropped at random steps."""
    chance = random.Random(seed)
    batch = Batch(engine.language)
    waiting = [
        (chance.sample(range(len(prompts)), chance.choice([1, 1, 1, 2, 3])), way)
        for way in chance.choices(range(len(WAYS)), k=14)
    ]
    expected = [plain(engine.generate([prompts[at] for at in which], WAYS[way])) for which, way in waiting]
    running, found, dropped = {}, {}, set()
    number = 0
    while len(found) + len(dropped) < len(waiting):
        coming = []
        while number < len(waiting) and (not running or chance.random() < 0.5):
            which, way = waiting[number]
            running[number] = engine.job([prompts[at] for at in which], WAYS[way])
            coming.append(running[number])
            number += 1
        batch.add(coming)
        if running and chance.random() < 0.1:
            gone = chance.choice(list(running))
            rows = running[gone].num_rows
            before = batch.num_rows
            batch.drop(running.pop(gone))
            assert batch.num_rows == before - rows and rows > 0
            dropped.add(gone)
        for job in batch.step():
            (at,) = (at for at, each in running.items() if each is job)
            found[at] = plain(running.pop(at).answers())
        assert batch.num_rows == sum(job.num_rows for job in running.values())
    assert batch.num_rows == 0
    assert found == {at: expected[at] for at in found} and len(found) > 6


def test_all_rows_pass_through_the_model_together(table_language):
    language = table_language(8, seed=3)
    engine = Engine(language, eos_token_ids=[])
    batch = Batch(language)
    batch.add([engine.job([language.prompt(1), language.prompt(2)], GenerateOptions(max_new_tokens=4))])
    batch.step()
    two = GenerateOptions(max_new_tokens=2)
    beams = engine.job([language.prompt(3)], replace(two, num_beams=3))
    batch.add([beams])
    assert language.rows_of_calls == [2, 2, 1]
    language.rows_of_calls.clear()
    ended = [len(batch.step()) for _ in range(4)]
    assert ended == [0, 1, 1, 0]
    assert language.rows_of_calls == [5, 2]  # and nothing more when all are over
    assert batch.step() == []
    language.rows_of_calls.clear()
    batch.add([engine.job([language.prompt(1)], two), engine.job([language.prompt(2)], replace(two, num_beams=3))])
    assert language.rows_of_calls == [2] and batch.num_rows == 4  # read together, whatever comes after


def test_a_listener_that_raises_ends_its_own_job_alone(engine, prompts):
    options = GenerateOptions(max_new_tokens=6, min_new_tokens=6)
    expected = plain(engine.generate(prompts[:1], options))
    heard = []

    def refuse(row, token):
        heard.append(token)
        if len(heard) == 3:
            raise ConnectionError("hung up")

    batch = Batch(engine.language)
    good = engine.job(prompts[:1], options)
    bad = engine.job(prompts[1:2], options, on_token=refuse)
    batch.add([good, bad])
    while not good.is_over:
        batch.step()
        assert bad.is_over == (len(heard) == 3)
    assert plain(good.answers()) == expected and len(heard) == 3
    with pytest.raises(ConnectionError, match="hung up"):
        bad.answers()


def test_a_job_that_is_over_is_dropped_without_effect(engine, prompts):
    batch = Batch(engine.language)
    job = engine.job(prompts[:1], GenerateOptions(max_new_tokens=1))
    batch.add([job])
    batch.step()
    batch.drop(job)
    assert job.is_over and batch.num_rows == 0 and len(job.answers()) == 1


def test_each_token_has_its_log_probability_and_their_sum_is_the_score(engine, prompts):
    options = GenerateOptions(max_new_tokens=6, min_new_tokens=6, sample=True, seed=3, num_return=2)
    for answers in engine.generate(prompts[:3], options):
        for answer in answers:
            assert len(answer.log_probs) == len(answer.tokens) == 6
            assert answer.score == pytest.approx(sum(answer.log_probs), abs=1e-4)
    [[best, *_]] = engine.generate(prompts[:1], GenerateOptions(max_new_tokens=6, num_beams=2))
    assert best.log_probs is None
