"""The front of several replicas, which here are applications in this process: what it answers, passes on, and tells."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import httpx
import pytest
from fastapi import FastAPI

from blip2.serve.app import create_app
from blip2.serve.front import Front, ReplicaDied, create_front
from blip2.serve.limits import Limits
from blip2.serve.replica import messages_of
from tests.serve.conftest import LONG, PICTURES, Running, eventually, running, slowed, user


class Near:
    """`front.Replicas` on the event loop of the front, where they take turns, and can be made to fail."""

    def __init__(self, apps: list[FastAPI]) -> None:
        self.apps = apps
        self.is_loaded = threading.Event()
        self.error: Exception | None = None
        self.dies_after: int | None = None
        """So many messages later, an answer breaks off."""
        self.hangs = False
        self.scopes: list[dict] = []

    def start(self, stopped: threading.Event) -> bool:
        while not self.is_loaded.wait(0.01) or any(app.state.service.refusal() for app in self.apps):
            if stopped.is_set():
                return False
        if self.error is not None:
            raise self.error
        return True

    def num_running(self) -> int:
        return len(self.apps)

    async def answer(self, scope, left_s, body):
        self.scopes.append(dict(scope))
        if self.hangs:
            await asyncio.Event().wait()
        scope["blip2.end_s"] = time.monotonic() + left_s
        app = self.apps[len(self.scopes) % len(self.apps)]
        num_sent = 0
        async for messages in messages_of(app, scope, body):
            for message in messages:
                if num_sent == self.dies_after:
                    raise ReplicaDied
                num_sent += 1
                yield [message]

    async def families(self):
        return [app.state.service.metrics.families() for app in self.apps]


@contextmanager
def fronted(
    load: Callable, *, num: int = 2, keys: tuple[str, ...] = (), is_loaded: bool = True, **limits
) -> Iterator[tuple[Running, Near]]:
    """A front, and its replicas."""
    near = Near([create_app(load, limits=Limits(**limits), replica=f"replica-{index}") for index in range(num)])
    if is_loaded:
        near.is_loaded.set()
    front = create_front(Front(near, Limits(**limits), num), keys=keys)
    own_life = front.router.lifespan_context
    apps = list(near.apps)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as stack:
            for each in apps:
                await stack.enter_async_context(each.router.lifespan_context(each))
            await stack.enter_async_context(own_life(app))
            yield

    front.router.lifespan_context = life
    with running(front, waits=is_loaded) as server:
        yield server, near


@pytest.fixture(scope="module")
def pair(models) -> Iterator[tuple[Running, Near]]:
    with fronted(lambda: models, keys=("secret",), max_body_bytes=500_000) as (server, near):
        server.http.headers["Authorization"] = "Bearer secret"
        yield server, near


def test_answers_are_those_of_a_replica_and_name_it(pair, models) -> None:
    server, near = pair
    answers = [server.chat(user("", PICTURES[0])) for _ in range(2)]
    caption = models.pipeline.caption(PICTURES[0])
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [caption, caption]
    assert {answer.headers["x-blip2-replica"] for answer in answers} == {"replica-0", "replica-1"}
    assert answers[0].headers.get_list("x-content-type-options") == ["nosniff"]
    assert b"authorization" not in dict(near.scopes[-1]["headers"])  # the key stays here
    with PICTURES[0].open("rb") as file:
        form = server.http.post("/caption", files={"image": file})
    assert form.json()["text"] == caption
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "miniature"


def test_events_are_passed_on_one_by_one(pair, models) -> None:
    server, _ = pair
    fields = {"messages": [user("", PICTURES[0])], "stream": True, "temperature": 0}
    with server.http.stream("POST", "/v1/chat/completions", json=fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    content = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(content) == models.pipeline.caption(PICTURES[0], num_beams=1) and len(content) > 3


def test_what_needs_no_model_does_not_reach_a_replica(pair) -> None:
    server, near = pair
    num_before = len(near.scopes)
    http = server.http
    codes = [http.get(path).status_code for path in ("/", "/page/page.js", "/health", "/ready", "/openapi.json")]
    assert codes == [200] * 5
    assert http.get("/nowhere").json()["error"]["code"] == "not_found"
    assert http.get("/caption").json()["error"]["code"] == "method_not_allowed"
    assert http.post("/caption", headers={"Authorization": "Bearer wrong"}).status_code == 401
    too_large = http.post("/caption", content=bytes(500_001))
    assert too_large.json()["error"]["code"] == "body_too_large"
    assert len(near.scopes) == num_before


def test_each_request_is_counted_once_and_each_name_described_once(pair) -> None:
    server, _ = pair
    counted = {"route": "/v1/chat/completions", "status": "200"}
    before = server.metric("blip2_request_seconds_count", **counted)
    assert server.chat(user("", PICTURES[0])).status_code == 200
    # It is counted when it is over, which may be a moment after its answer was read.
    eventually(lambda: server.metric("blip2_request_seconds_count", **counted) == before + 1)
    assert server.metric("blip2_requests_rejected_total", reason="invalid_api_key", replica="front") >= 0
    text = server.http.get("/metrics").text
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert all(f'blip2_rows{{replica="replica-{index}"}} 0.0' in text for index in range(2))


def test_a_front_whose_replicas_are_loading_says_so_and_then_answers(models) -> None:
    with fronted(lambda: models, num=1, is_loaded=False) as (server, near):
        assert server.http.get("/health").status_code == 200
        for answer in (server.http.get("/ready"), server.chat(user("", PICTURES[0])), server.http.get("/v1/models")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
            assert answer.headers["retry-after"] and int(answer.headers["x-blip2-loading-seconds"]) >= 0
        near.is_loaded.set()
        eventually(lambda: server.http.get("/ready").status_code == 200)
        assert server.chat(user("", PICTURES[0])).status_code == 200
        apps, near.apps = near.apps, []
        eventually(lambda: server.http.get("/ready").status_code == 503)
        answer = server.chat(user("", PICTURES[0]))
        assert answer.json()["error"]["code"] == "no_replica" and answer.headers["retry-after"]
        near.apps = apps
        eventually(lambda: server.chat(user("", PICTURES[0])).status_code == 200)


def test_a_replica_that_dies_costs_its_requests_a_503(pair) -> None:
    server, near = pair
    near.dies_after = 0
    try:
        answer = server.chat(user("", PICTURES[0]))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (503, "replica_died", "server_error")
        assert answer.headers["retry-after"] == "1"
        near.dies_after = 3
        fields = {"messages": [user("", PICTURES[0])], "stream": True}
        answer = server.http.post("/v1/chat/completions", json=fields)
        *events, last = [line for line in answer.text.splitlines() if line]
        assert answer.status_code == 200 and len(events) == 2
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_died"
        near.dies_after = 1  # the head of a whole answer is out
        with pytest.raises(httpx.RemoteProtocolError):
            server.chat(user("", PICTURES[0]))
    finally:
        near.dies_after = None
    assert server.chat(user("", PICTURES[0])).status_code == 200


def test_who_hangs_up_is_not_written_for(tiny_models) -> None:
    with slowed(tiny_models, 0.05), fronted(lambda: tiny_models, num=1) as (server, _):
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(
                "/v1/chat/completions", json={"messages": [user("", PICTURES[0])], **LONG}, timeout=httpx.Timeout(0.5)
            )
        eventually(lambda: server.metric("blip2_rows", replica="replica-0") == 0, 1)  # alone it takes 4.5 s
        with server.http.stream(
            "POST", "/v1/chat/completions", json={"messages": [user("", PICTURES[0])], "stream": True, **LONG}
        ) as response:
            next(response.iter_lines())
            assert server.metric("blip2_rows") == 1
        eventually(lambda: server.metric("blip2_rows") == 0, 1)
        assert server.metric("blip2_requests_in_house", replica="front") == 0


def test_a_replica_that_hangs_is_given_up_after_the_deadline(models, monkeypatch) -> None:
    monkeypatch.setattr("blip2.serve.front.GRACE_S", 0.1)
    with fronted(lambda: models, num=1, deadline_s=0.2) as (server, near):
        near.hangs = True
        answer = server.chat(user("", PICTURES[0]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")


def test_what_kept_a_model_from_being_loaded_is_kept_for_whoever_runs_the_server() -> None:
    near = Near([])
    near.error = ValueError("no such folder")
    near.is_loaded.set()
    front = Front(near, Limits(), 2)
    front.start()
    eventually(lambda: front.load_error is not None)
    assert front.load_error is near.error
    refusal = front.refusal()
    assert refusal is not None and refusal.code == "model_failed"
    assert front.limits.max_queue == 2 * Limits().max_queue
