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
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from blip2.errors import CheckpointError
from blip2.generation import Batch
from blip2.serve.app import create_app
from blip2.serve.limits import Limits
from blip2.serve.loading import Loading
from blip2.serve.run import EX_DEAD_MODEL, EX_FORCED, listen, run
from blip2.serve.service import Models
from blip2.serve.worker import MAX_FAILURES
from tests.serve.conftest import LONG, PICTURES, eventually, serving, slowed, user

ROOT = Path(__file__).parents[2]


def test_a_server_with_nothing_to_do_gives_back_memory_once(tiny_models, monkeypatch) -> None:
    given = []
    monkeypatch.setattr("blip2.serve.worker.IDLE_S", 0.05)
    monkeypatch.setattr("blip2.serve.worker.release_memory", lambda: given.append(time.monotonic()))
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
    plain = pipeline.frontend.encode

    def encode(pixels):
        if any(float(each.mean()) > 1.5 for each in pixels):  # the white image
            raise RuntimeError("this picture is cursed")
        return plain(pixels)

    pipeline.frontend.encode = encode
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
        for path in ("/ready", "/health"):  # whoever watches either of them knows what to do
            told = server.http.get(path)
            assert (told.status_code, told.json()["error"]["code"]) == (503, "model_stopped")
        assert server.chat(user("", PICTURES[0])).status_code == 503
        assert server.metric("blip2_requests_waiting") == server.metric("blip2_rows") == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError()]
)
def test_a_step_without_memory_is_not_the_end(tiny_models, monkeypatch, error) -> None:
    plain_step = Batch.step

    def step(batch: Batch):
        if batch.num_rows > 4:
            raise error
        return plain_step(batch)

    monkeypatch.setattr(Batch, "step", step)
    with serving(lambda: tiny_models) as server:
        for _ in range(2 * MAX_FAILURES):
            told = server.chat(user("", PICTURES[0]), num_beams=8)
            assert (told.status_code, told.json()["error"]["code"]) == (503, "out_of_memory")
            assert told.headers["retry-after"]
        assert server.chat(user("", PICTURES[0]), num_beams=2, max_tokens=3).status_code == 200
        assert server.http.get("/health").status_code == 200


def running(models: Models, then: Callable[[str], object], **limits: float) -> object:
    """What the process does with the server in its main thread, and what ``then``, beside it, gives."""
    found: list[object] = []
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def beside() -> None:
        eventually(lambda: httpx.get(f"{url}/ready").status_code == 200)
        found.append(then(url))

    thread = threading.Thread(target=beside)
    run(create_app(lambda: models, limits=Limits(**limits)), listener, on_open=thread.start)
    thread.join()
    return found[0]


def test_a_dead_model_ends_the_process_with_a_code(tiny_models, monkeypatch, capsys) -> None:
    def step(batch: Batch):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Batch, "step", step)
    found: list[int] = []

    def ask(url: str) -> None:
        body = {"messages": [user("", PICTURES[0])]}
        found.extend(httpx.post(f"{url}/v1/chat/completions", json=body).status_code for _ in range(MAX_FAILURES))

    with pytest.raises(SystemExit) as ended:
        running(tiny_models, ask)
    assert ended.value.code == EX_DEAD_MODEL
    assert found == [500] * (MAX_FAILURES - 1) + [503]
    said = capsys.readouterr().err
    assert said.endswith("blip2: the model has stopped (RuntimeError: the device is gone); restart the server\n")


def test_who_is_still_waiting_at_the_end_is_told(tiny_models) -> None:
    def ask(url: str) -> list[str]:
        heard = []

        def one(is_stream: bool) -> None:
            body = {"messages": [user("", PICTURES[0])], "stream": is_stream, **LONG}
            heard.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).text)

        threads = [threading.Thread(target=one, args=(is_stream,)) for is_stream in (True, False)]
        for thread in threads:
            thread.start()
        eventually(lambda: "blip2_rows 2.0" in httpx.get(f"{url}/metrics").text)
        os.kill(os.getpid(), signal.SIGTERM)
        for thread in threads:
            thread.join()
        return heard

    with slowed(tiny_models, 0.1):
        heard = running(tiny_models, ask, shutdown_s=0.5)
    assert len(heard) == 2
    assert all('"code":"stopping"' in each and "[DONE]" not in each for each in heard)


def test_while_the_model_loads_the_port_is_open_and_not_ready(models) -> None:
    may_load, loading = threading.Event(), Loading()

    def load():
        may_load.wait(20)
        return models

    with serving(load, waits=False, loading=loading) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        for response in (server.http.get("/ready"), server.chat(user("", PICTURES[0])), server.http.get("/v1/models")):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
            assert response.headers["retry-after"] and int(response.headers["x-blip2-loading-seconds"]) >= 0
            assert "x-blip2-loading-percent" not in response.headers
        loading.note(2 * 2**30, 5 * 2**30)
        response = server.http.get("/ready")
        assert response.headers["x-blip2-loading-percent"] == "40"
        assert " s so far, 40 %)" in response.json()["error"]["message"]
        may_load.set()
        eventually(lambda: server.http.get("/ready").status_code == 200)


def test_what_hangs_does_not_hold_up_the_end() -> None:
    """A thread that Python would join for ever; and a second Ctrl-C waits for nothing at all."""
    code = (
        "import sys, threading, time\n"
        "from blip2.cli import main\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "sys.argv = ['blip2', 'serve', '--port', '0', '--shutdown-timeout', sys.argv[1]]\n"
        "main()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, shutdown_s], cwd=ROOT, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        for shutdown_s in ("0.5", "50")
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout.readline().startswith("listening")
        processes[0].send_signal(signal.SIGTERM)
        processes[1].send_signal(signal.SIGINT)
        assert processes[0].wait(20) == EX_FORCED
        assert processes[0].stderr.read() == "blip2: something did not end within 0.5 s and was aborted\n"
        processes[1].send_signal(signal.SIGINT)
        assert processes[1].wait(20) == 128 + signal.SIGINT
        assert processes[1].stderr.read() == "blip2: stopped at once\n"
    finally:
        for process in processes:
            process.kill()


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


def test_what_kept_a_model_from_being_loaded_is_not_told_to_strangers() -> None:
    def load():
        raise CheckpointError("/home/somebody/models/opt: no such folder")

    with serving(load, waits=False, keys=("secret",)) as server:
        eventually(lambda: server.service.load_error is not None)
        response = server.http.get("/ready")  # which needs no key
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_failed")
    assert "somebody" not in response.text
