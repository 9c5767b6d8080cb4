"""Steps that are recorded for a GPU give what plain steps give; here the recording is a function that steps again."""

import random

import pytest
import torch

from blip2.generation import Batch, Engine, GenerateOptions, replay
from blip2.generation.replay import MIN_REPEATS, MOST_ROWS, Replay, weights_of
from tests.generation.test_batch import ENDS, WAYS, plain


class Recorder:
    """Replays a step by calling it, as a graph does: what it wrote and returned is in the same memory as before."""

    def __init__(self):
        self.num_recorded = self.num_replayed = 0

    def __call__(self, step):
        self.num_recorded += 1
        logits = []

        def again():
            self.num_replayed += 1
            found = step()
            if not logits:
                logits.append(found.clone())
            return logits[0].copy_(found)

        return again


@pytest.fixture
def recorder(monkeypatch):
    """All batches step by it."""
    recorder, replays = Recorder(), {}
    shared = lambda language: replays.setdefault(id(language), Replay(language, recorder))  # noqa: E731
    monkeypatch.setattr("blip2.generation.batch.replay_of", shared)
    return recorder


@pytest.fixture
def expected(language, prompts):
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    return [plain(engine.generate(prompts, way)) for way in WAYS]


def test_the_answers_are_those_of_plain_steps(language, prompts, expected, recorder):
    """Greedily, sampled, with beams; rows end, and others take their places in the same memory."""
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    for _ in range(2):
        assert [plain(engine.generate(prompts, way)) for way in WAYS] == expected
    assert recorder.num_recorded > 2 and recorder.num_replayed > 20


@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_and_goes(language, prompts, recorder, seed):
    chance = random.Random(seed)
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    alone = [[plain(engine.generate([prompt], way)) for prompt in prompts] for way in WAYS]
    batch, running = Batch(language), {}
    for _ in range(60):
        coming = [(chance.randrange(len(WAYS)), chance.randrange(len(prompts))) for _ in range(chance.randrange(3))]
        jobs = [engine.job([prompts[at]], WAYS[way]) for way, at in coming]
        running |= dict(zip(jobs, coming, strict=True))
        batch.add(jobs)
        if running and chance.random() < 0.1:
            batch.drop(gone := chance.choice(list(running)))
            del running[gone]
        for job in batch.step():
            way, at = running.pop(job)
            assert plain(job.answers()) == alone[way][at]
    assert recorder.num_replayed > 5


def test_two_batches_take_turns_and_neither_notices(language, prompts, expected, recorder):
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    for way in (0, 0, 1, 0):
        batches = [Batch(language), Batch(language)]
        jobs = [engine.job(prompts, WAYS[way]) for _ in batches]
        for batch, job in zip(batches, jobs, strict=True):
            batch.add([job])
        while not all(job.is_over for job in jobs):
            for batch in batches:
                batch.step()
        assert [plain(job.answers()) for job in jobs] == [expected[way]] * 2


def test_numbers_that_were_none_do_not_reach_the_next(language, prompts, expected, recorder):
    """A batch that ended in NaN has left it in the memory that the next one takes over."""
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    for _ in range(3):
        engine.generate(prompts, WAYS[0])
    first = recorder.num_replayed
    batch = Batch(language)
    batch.add([engine.job(prompts, WAYS[0])])
    batch.step()
    batch.step()
    assert recorder.num_replayed > first
    cache = getattr(batch._state, "cache", batch._state)
    with torch.inference_mode():
        for part in (*cache.keys, *cache.values):
            part.fill_(torch.nan)
    del batch, cache, part
    assert plain(engine.generate(prompts, WAYS[0])) == expected[0]


def test_weights_that_moved_are_recorded_anew(language, prompts, recorder):
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    options = GenerateOptions(max_new_tokens=12, min_new_tokens=12)
    for _ in range(3):
        engine.generate(prompts, options)
    before, weights = recorder.num_recorded, weights_of(language)
    language.double().float()
    assert weights_of(language) != weights
    for _ in range(3):
        engine.generate(prompts, options)
    assert recorder.num_recorded > before > 0


@pytest.mark.parametrize("obstacle", ["hook", "switch", "autocast", "rows"])
def test_where_nothing_can_be_recorded_steps_are_plain(language, prompts, recorder, monkeypatch, request, obstacle):
    engine = Engine(language, eos_token_ids=ENDS)
    options = GenerateOptions(max_new_tokens=MIN_REPEATS + 3, min_new_tokens=MIN_REPEATS + 3)
    if obstacle == "hook":
        hook = next(language.children()).register_forward_hook(lambda *_: None)
        request.addfinalizer(hook.remove)
    if obstacle == "switch":
        monkeypatch.setenv(replay.SWITCH, "0")
    many = prompts * (MOST_ROWS // len(prompts) + 1) if obstacle == "rows" else prompts
    with torch.autocast("cpu", torch.bfloat16, enabled=obstacle == "autocast"):
        assert len(engine.generate(many, options)) == len(many)
    assert recorder.num_recorded == 0


def test_steps_that_cannot_be_recorded_are_taken_without(language, prompts, expected, monkeypatch):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    replays, said = {}, []
    monkeypatch.setattr(replay.logger, "warning", lambda text, *values: said.append(text % values))
    shared = lambda language: replays.setdefault(id(language), Replay(language, refuse))  # noqa: E731
    monkeypatch.setattr("blip2.generation.batch.replay_of", shared)
    engine = Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])
    assert [plain(engine.generate(prompts, way)) for way in WAYS] == expected
    assert said and said[0].startswith("steps cannot be recorded (operation not permitted")
