"""Many at once: each gets the answer that it would have got alone, and none waits for another."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from blip2.api import Pipeline
from tests.serve.conftest import PICTURES, Running, user

QUESTIONS = ("how many dogs are in the picture?", "what is in the picture?", "what color is the background?",
             "is there a boat in the picture?")  # fmt: skip
ANSWERS = ("two", "a boat and two dogs", "blue")
Case = tuple[dict[str, Any], Callable[[Pipeline], str]]


def case(chance: random.Random) -> Case:
    """What a client sends, and what the same is in Python."""
    picture, question = chance.choice(PICTURES), chance.choice(QUESTIONS)
    seed = chance.randrange(100)
    drawn = {"sample": True, "temperature": 1.2, "top_p": 0.95, "seed": seed}
    fields = {"temperature": 1.2, "top_p": 0.95, "seed": seed}
    past = [(chance.choice(QUESTIONS), chance.choice(ANSWERS)) for _ in range(chance.choice([1, 2]))]

    def chat(blip: Pipeline) -> str:
        talk = blip.chat(picture)
        talk.history += past
        return talk.say(question)

    turns = [user(past[0][0], picture), {"role": "assistant", "content": past[0][1]}]
    for asked, said in past[1:]:
        turns += [user(asked), {"role": "assistant", "content": said}]
    asked_once, alone = [user(question, picture)], [user("", picture)]
    return chance.choice([
        ({"messages": asked_once}, lambda blip: blip.ask(picture, question)),
        ({"messages": asked_once, "temperature": 0}, lambda blip: blip.ask(picture, question, num_beams=1)),
        ({"messages": asked_once, **fields}, lambda blip: blip.ask(picture, question, **drawn)),
        ({"messages": alone}, lambda blip: blip.caption(picture)),
        ({"messages": alone, "num_beams": 3}, lambda blip: blip.caption(picture, num_beams=3)),
        ({"messages": alone, **fields}, lambda blip: blip.caption(picture, **drawn)),
        ({"messages": [*turns, user(question)]}, chat),
        ({"messages": asked_once, "max_tokens": 1}, lambda blip: blip.ask(picture, question, max_new_tokens=1)),
    ])  # fmt: skip


def check(server: Running, blip: Pipeline, num_requests: int, num_clients: int) -> None:
    chance = random.Random(num_requests)
    cases = [case(chance) for _ in range(num_requests)]
    expected = [in_python(blip) for _, in_python in cases]
    with ThreadPoolExecutor(num_clients) as pool, httpx.Client(base_url=server.url, timeout=120) as http:
        responses = list(pool.map(lambda each: http.post("/v1/chat/completions", json=each[0]), cases))
    assert [response.status_code for response in responses] == [200] * num_requests
    assert [response.json()["choices"][0]["message"]["content"] for response in responses] == expected
    assert len(set(expected)) > 6
    for gauge in ("running", "waiting"):
        assert server.metric(f"blip2_requests_{gauge}") == 0
    assert server.metric("blip2_rows") == server.metric("blip2_requests_in_house") == 0


def test_answers_under_load_are_those_alone(server, models) -> None:
    steps = server.metric("blip2_batch_size_count")
    rows = server.metric("blip2_batch_size_sum")
    check(server, models.pipeline, num_requests=24, num_clients=8)
    steps, rows = server.metric("blip2_batch_size_count") - steps, server.metric("blip2_batch_size_sum") - rows
    assert rows > 5 * steps  # they were written side by side


@pytest.mark.slow
def test_two_hundred_requests_of_32_clients(server, models) -> None:
    check(server, models.pipeline, num_requests=200, num_clients=32)


def test_a_short_answer_overtakes_a_long_one(server) -> None:
    """Nobody waits for the end of a batch."""
    with ThreadPoolExecutor(2) as pool:
        done: list[str] = []

        def ask(name: str, **fields: Any) -> None:
            server.chat(user("", PICTURES[0]), **fields)
            done.append(name)

        long = pool.submit(ask, "long", temperature=0, max_tokens=300, min_new_tokens=300)
        while server.metric("blip2_rows") == 0:
            pass
        pool.submit(ask, "short", temperature=0, max_tokens=2).result()
        assert done == ["short"]
        long.result()
