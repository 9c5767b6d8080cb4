"""Clients that hang up, answers that take too long, a model that dies, a server that is stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from blip2.serve.limits import Limits
from tests.serve.conftest import LONG, PICTURES, eventually, serving, slowed, user

ROOT = Path(__file__).parents[2]


def test_a_server_with_nothing_to_do_gives_back_memory_once(tiny_models, monkeypatch) -> None:
    given = []
    monkeypatch.setattr("blip2.serve.worker.IDLE_S", 0.05)
    monkeypatch.setattr("blip2.serve.worker.give_back_memory", lambda: given.append(time.monotonic()))
    with serving(lambda: tiny_models) as server:
        eventually(lambda: len(given) == 1)
        assert server.chat(user("", PICTURES[0]), max_tokens=3).status_code == 200
        eventually(lambda: len(given) == 2)
        time.sleep(0.3)
        assert len(given) == 2


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_hangs_up_frees_the_rows_at_once(tiny_models, is_stream) -> None:
    with slowed(tiny_models) as steps, serving(lambda: tiny_models) as server:
        body = json.dumps({"messages": [user("", PICTURES[0])], "stream": is_stream, **LONG}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            eventually(lambda: server.metric("blip2_rows") == 1)
            if is_stream:
                assert b"200 OK" in client.recv(100)
        eventually(lambda: server.metric("blip2_rows") == 0)
        assert steps() < LONG["max_tokens"] / 2
        assert server.metric("blip2_requests_running") == 0
        eventually(lambda: server.metric("blip2_requests_in_house") == 0)


def test_who_hangs_up_while_waiting_is_never_begun(tiny_models) -> None:
    with slowed(tiny_models) as steps, serving(lambda: tiny_models, limits=Limits(max_rows=1)) as server:
        first = threading.Thread(target=server.chat, args=(user("", PICTURES[0]),), kwargs=LONG | {"max_tokens": 95})
        first.start()
        eventually(lambda: server.metric("blip2_requests_running") == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"messages": [user("", PICTURES[1])], **LONG},
                timeout=httpx.Timeout(10, read=0.3),
            )
        eventually(lambda: server.metric("blip2_requests_waiting") == 0)
        assert first.is_alive()  # its place was not what freed the queue
        first.join()
        assert steps() == pytest.approx(94, abs=2)


def test_an_answer_that_takes_too_long_is_given_up(tiny_models) -> None:
    with slowed(tiny_models) as steps, serving(lambda: tiny_models, limits=Limits(deadline_s=0.3)) as server:
        late = server.chat(user("", PICTURES[0]), **LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
        streamed = server.chat(user("", PICTURES[0]), stream=True, **LONG)
        assert '"code":"deadline"' in streamed.text.replace(" ", "") and "[DONE]" not in streamed.text
        eventually(lambda: server.metric("blip2_rows") == 0)
        assert steps() < 50
        quick = server.chat(user("", PICTURES[0]), max_tokens=2, temperature=0)
        assert quick.status_code == 200


def test_an_error_in_one_request_is_its_own(tiny_models) -> None:
    pipeline = tiny_models.pipeline
    plain = pipeline.eye.encode

    def encode(pixels):
        if any(float(each.mean()) > 1.5 for each in pixels):  # the white picture
            raise RuntimeError("this picture is cursed")
        return plain(pixels)

    pipeline.eye.encode = encode
    Image.new("RGB", (8, 8), "white").save(content := BytesIO(), "PNG")
    with serving(lambda: tiny_models) as server, slowed(tiny_models, 0.02):
        found = {}

        def ask(number: int) -> None:
            picture = content.getvalue() if number % 4 == 0 else PICTURES[number % 3]
            found[number] = server.chat(user("", picture), max_tokens=8, temperature=0)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number].status_code for number in range(12)] == [500, 200, 200, 200] * 3
        # The server ends such a connection; a client that is not told sends its next request into nothing.
        assert [found[number].headers.get("connection") for number in range(12)] == ["close", None, None, None] * 3
        assert "cursed" not in found[0].text


def test_if_the_model_dies_all_are_told_and_the_server_says_so(tiny_models) -> None:
    language = tiny_models.pipeline.speaker.engine.language
    plain_step = language.step
    is_dead = threading.Event()

    def step(tokens_B, state):
        time.sleep(0.02)
        if is_dead.is_set():
            raise SystemExit("out of the thread")
        return plain_step(tokens_B, state)

    language.step = step
    with serving(lambda: tiny_models, limits=Limits(max_rows=2)) as server:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(server.chat(user("", PICTURES[0]), **LONG))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.metric("blip2_requests_waiting") == 2)
        is_dead.set()
        for thread in threads:
            thread.join(10)
        assert [(each.status_code, each.json()["error"]["code"]) for each in found] == [(503, "model_stopped")] * 4
        assert server.http.get("/ready").status_code == 503 and server.http.get("/health").status_code == 200
        assert server.chat(user("", PICTURES[0])).status_code == 503
        assert server.metric("blip2_requests_waiting") == server.metric("blip2_rows") == 0


def test_while_the_model_loads_the_port_is_open_and_not_ready(models) -> None:
    may_load = threading.Event()

    def load():
        may_load.wait(20)
        return models

    with serving(load, waits=False) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        for response in (server.http.get("/ready"), server.chat(user("", PICTURES[0])), server.http.get("/v1/models")):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
            assert response.headers["retry-after"]
        may_load.set()
        eventually(lambda: server.http.get("/ready").status_code == 200)


def start(*arguments: str) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "blip2", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line.startswith("listening at http://127.0.0.1:"), process.stderr.read()
    return process, line.split()[2]


def test_a_stop_signal_finishes_what_is_running(opt_model) -> None:
    process, url = start("-m", str(opt_model))
    try:
        with httpx.Client(base_url=url, timeout=30) as http:
            eventually(lambda: http.get("/ready").status_code == 200, 60)
            fields = {"max_tokens": 95, "min_new_tokens": 95, "num_beams": 64}
            found = []

            def ask() -> None:
                found.append(httpx.post(f"{url}/v1/chat/completions", json={
                    "messages": [user("", PICTURES[0])], **fields}, timeout=30))  # fmt: skip

            thread = threading.Thread(target=ask)
            thread.start()
            eventually(lambda: "blip2_rows 64.0" in http.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 95
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.stderr.read() == ""
    finally:
        process.kill()
