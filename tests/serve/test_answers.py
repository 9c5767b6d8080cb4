"""Answers that are large, and work that takes long: nothing of it is done by the event loop, or at one go."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import pytest

from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits
from blip2.serve.service import Service
from tests.serve.conftest import PICTURES, data_url, eventually, serving, user


@pytest.fixture
def service() -> Service:
    return Service(lambda: pytest.fail("no model is wanted"), Limits(), Fetcher())


def threads_of(number: int) -> Iterator[str]:
    return (threading.current_thread().name for _ in range(number))


def test_what_takes_longer_than_a_moment_goes_on_in_a_thread(service) -> None:
    async def use() -> None:
        here = threading.current_thread().name
        assert await service.in_thread("a", threads_of(3)) == [here] * 3
        assert here not in await service.in_thread("a", threads_of(3), is_small=False)

        def slow() -> Iterator[str]:
            for name in threads_of(5):
                time.sleep(0.01)
                yield name

        first, *others = await service.in_thread("a", slow())
        assert first == here and here not in others and len(others) == 4

    asyncio.run(use())


def test_work_aside_that_nobody_waits_for_is_left(service) -> None:
    numbers: list[int] = []

    def slow() -> Iterator[None]:
        for number in range(500):
            numbers.append(number)
            time.sleep(0.01)
            yield

    async def use() -> None:
        work = asyncio.create_task(service.in_thread("a", slow()))
        await asyncio.sleep(0.1)
        work.cancel()
        await asyncio.sleep(0.1)
        before = len(numbers)
        await asyncio.sleep(0.1)
        assert len(numbers) == before < 500
        assert await service.in_thread("b", iter([1]), is_small=False) == [1]  # the thread is free again

    asyncio.run(use())


def test_log_probabilities_of_many_tokens_are_whole_and_in_order(server) -> None:
    fields = {"n": 2, "temperature": 1.0, "seed": 1, "max_tokens": 40, "min_new_tokens": 40}
    told = server.chat(user("", PICTURES[0]), logprobs=True, top_logprobs=3, **fields).json()
    plain = server.chat(user("", PICTURES[0]), **fields).json()
    for choice, without in zip(told["choices"], plain["choices"], strict=True):
        assert choice["message"] == without["message"] and without["logprobs"] is None
        places = choice["logprobs"]["content"]
        assert len(places) == 40
        for place in places:
            assert place["bytes"] == list(place["token"].encode()) and len(place["top_logprobs"]) == 3
            best = [other["logprob"] for other in place["top_logprobs"]]
            assert best == sorted(best, reverse=True) and place["logprob"] <= best[0] + 1e-4


def test_an_answer_is_not_made_of_millions_of_log_probabilities(server) -> None:
    asked = {"n": 64, "temperature": 1.0, "max_tokens": 400, "logprobs": True, "top_logprobs": 20}
    told = server.chat(user("", PICTURES[0]), **asked)
    assert told.status_code == 400 and told.json()["error"]["code"] == "too_many_logprobs"


def test_many_texts_are_compared_as_few_are(server) -> None:
    texts = [f"{number} {'dogs and a boat ' * (number % 7)}" for number in range(80)]
    together = server.http.post("/match", json={"image": data_url(PICTURES[0]), "texts": texts}).json()["results"]
    assert [result["text"] for result in together] == texts
    alone = server.http.post("/match", json={"image": data_url(PICTURES[0]), "texts": texts[40:42]}).json()["results"]
    for one, other in zip(together[40:42], alone, strict=True):
        assert one["itm_probability"] == pytest.approx(other["itm_probability"], abs=1e-5)
        assert one["itc_cosine"] == pytest.approx(other["itc_cosine"], abs=1e-5)
    assert sum(result["itc_probability"] for result in together) == pytest.approx(1)
    vectors = server.http.post("/v1/embeddings", json={"input": texts}).json()
    [last] = server.http.post("/v1/embeddings", json={"input": texts[-1:]}).json()["data"]
    assert [entry["index"] for entry in vectors["data"]] == list(range(80))
    assert vectors["data"][-1]["embedding"] == pytest.approx(last["embedding"], abs=1e-5)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/match", {"image": data_url(PICTURES[0]), "texts": ["a dog"] * 256}),
        ("/v1/embeddings", {"input": ["a dog"] * 256}),
    ],
    ids=["match", "embeddings"],
)
def test_texts_that_take_too_long_are_given_up_between_portions(tiny_models, path, content) -> None:
    model = tiny_models.matcher.model
    plain, portions = model.embed_text, []

    def embed_text(*given):
        portions.append(len(given[0]))
        time.sleep(0.2)
        return plain(*given)

    model.embed_text = embed_text
    with serving(lambda: tiny_models, limits=Limits(deadline_s=0.5)) as server:
        few = {**content, list(content)[-1]: ["a dog"]}
        eventually(lambda: server.http.post(path, json=few).status_code == 200)
        portions.clear()
        told = server.http.post(path, json=content)
        assert (told.status_code, told.json()["error"]["code"]) == (504, "deadline")
        eventually(lambda: server.metric("blip2_requests_waiting") == 0)
        assert sum(portions) < 256 and max(portions) <= 16


@pytest.mark.parametrize("field", ["caption", "answer"])
def test_only_a_text_that_could_have_been_asked_for_is_explained(tiny_models, field) -> None:
    with serving(lambda: tiny_models, limits=Limits(max_new_tokens=8, max_prompt_tokens=20)) as server:
        asked = {"image": data_url(PICTURES[0])} | ({"question": "is it red?"} if field == "answer" else {})
        told = server.http.post("/explain", json={**asked, field: "a b c d e f g h i j"})
        assert told.status_code == 400 and told.json()["error"]["param"] == field
        assert "the limit is 8" in told.json()["error"]["message"]
        told = server.http.post("/explain", json={**asked, "question": "is it red? " * 20})
        assert told.status_code == 400 and told.json()["error"]["code"] == "prompt_too_long"


def test_the_answers_of_the_plain_routes_are_described(server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    described = {"/caption": "Answered", "/ask": "Answered", "/match": "Matched", "/explain": "Explained"}
    for path, name in described.items():
        content = paths[path]["post"]["responses"]["200"]["content"]["application/json"]
        assert json.dumps(content).endswith(f'/{name}"}}}}')
