"""Several replicas behind one port: what each is given, how it is watched, and the whole of it, by Ray."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest

import blip2
from blip2.api.cluster import connect, shares
from blip2.errors import CheckpointError, OptionError
from blip2.serve.app import create_app
from blip2.serve.replica import TRIM_AFTER_BYTES, MemoryTrimmer, load_error, replica_of
from tests.serve.conftest import PICTURES, eventually, serving, user

ROOT = Path(__file__).parents[2]


def node(cpus: float, gpus: int = 0) -> dict:
    return {"Alive": True, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "replicas", "device", "cpus", "gpus"),
    [
        ([node(2)], 2, "auto", 1, 0),
        ([node(2)], 3, "auto", 0.6666, 0),
        ([node(8), node(8)], 3, "cpu", 4, 0),  # not 5.3, which the third would not find
        ([node(8), node(2)], 2, "auto", 4, 0),
        ([node(8, 2), node(8, 2)], 4, "auto", 4, 1),
        ([node(8, 1)], 2, "cpu", 4, 0),
        ([{"Alive": False, "Resources": {"CPU": 64}}, node(4)], 1, "auto", 4, 0),
    ],
)
def test_each_has_an_equal_share(nodes, replicas, device, cpus, gpus) -> None:
    assert shares(nodes, replicas, device) == {"num_cpus": cpus, "num_gpus": gpus}


@pytest.mark.parametrize(
    ("nodes", "device", "words"),
    [
        ([node(8, 1)], "auto", "one GPU each, but there are 1"),
        ([node(8)], "cuda", "there are 0"),
        ([node(8, 2)], "cuda:1", "use cuda or auto"),
        ([node(0)], "cpu", "no free processor"),
    ],
)
def test_what_cannot_be_shared(nodes, device, words) -> None:
    with pytest.raises(OptionError, match=words):
        shares(nodes, 2, device)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"),
        ("ray://host:10001", "a machine of the cluster"),
    ],
)
def test_a_cluster_that_cannot_be_had(address, words) -> None:
    with pytest.raises(OptionError, match=words):
        connect(None, address)


def made_without_ray(load):
    """A replica as Ray would make it, on an event loop."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    serve = SimpleNamespace(get_replica_context=lambda: context)
    return replica_of(serve, load, lambda load, name: create_app(load, replica=name))()


def test_a_replica_is_healthy_once_it_has_loaded_and_dies_with_its_model(tiny_models, monkeypatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("blip2.serve.replica.os._exit", exits.append)
    monkeypatch.setattr("blip2.serve.replica.DEATH_S", 0.01)

    async def live() -> None:
        replica = made_without_ray(lambda: tiny_models)
        await replica.check_health()
        service = replica.app.state.service
        await asyncio.sleep(0.05)
        assert service.refusal() is None and not exits
        service.worker._death = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="the model has stopped"):
            await replica.check_health()
        await asyncio.sleep(0.05)
        assert exits == [1]
        await replica.__del__()
        assert service.is_stopping and replica.__del__() is None

    asyncio.run(live())


def test_what_a_replica_cannot_load_is_told_as_ever() -> None:
    def load():
        raise CheckpointError("nowhere: no such folder\nat all")

    with pytest.raises(RuntimeError) as raised:
        made_without_ray(load)
    account = f"Failed to start. Error:\nTraceback (most recent call last):\n...\nRuntimeError: {raised.value}\n\nmore"
    found = load_error(account)
    assert type(found) is CheckpointError and str(found) == "nowhere: no such folder\nat all"
    assert str(load_error("first\nModuleNotFoundError: No module named 'blip2'\n")).startswith("ModuleNotFoundError")


def test_freed_memory_is_given_back_after_large_bodies_now_and_then(monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("blip2.serve.replica.release_memory", lambda: calls.append(1))
    monkeypatch.setattr("blip2.serve.replica.TRIM_INTERVAL_S", 0)
    tidy = MemoryTrimmer()
    for num_bytes, num_calls in ((TRIM_AFTER_BYTES - 1, 0), (1, 1), (0, 1)):
        tidy.note(num_bytes)
        tidy.look()
        assert len(calls) == num_calls


def test_answers_and_numbers_carry_the_replicas_name(models) -> None:
    with serving(lambda: models, replica="one") as server:
        answer = server.chat(user("", PICTURES[0]))
        assert answer.headers["x-blip2-replica"] == "one"
        assert server.metric("blip2_images_encoded_total", replica="one") == 1
        lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        assert all('replica="one"' in line for line in lines)


# ---- with Ray ----


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "blip2", "serve", "--engine", "ray", "--port", "0", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def replicas_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for each in family(process):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile, or nearly
            if "ServeReplica" in " ".join(each.cmdline()):
                found.append(each)
    return found


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[subprocess.Popen, str]]:
    """The miniature, twice."""
    pytest.importorskip("ray")
    process = start("--replicas", "2")
    try:
        line = process.stdout.readline()
        assert line.startswith("listening at http://127.0.0.1:"), process.stderr.read()
        yield process, line.split()[2]
    finally:
        process.terminate()
        process.wait(60)


def names(http: httpx.Client, tries: int = 40) -> set[str]:
    return {http.get("/v1/models").headers["x-blip2-replica"] for _ in range(tries)}


@pytest.mark.slow
def test_both_answer_as_python_does(two, models) -> None:
    _, url = two
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    pipeline = models.pipeline
    answered = set()
    for _ in range(8):
        for picture in PICTURES:
            question = "how many dogs are in the picture?"
            for text, expected in (("", pipeline.caption(picture)), (question, pipeline.ask(picture, question))):
                raw = client.chat.completions.with_raw_response.create(model="blip2", messages=[user(text, picture)])
                assert raw.parse().choices[0].message.content == expected
                answered.add(raw.headers["x-blip2-replica"])
    assert len(answered) == 2


@pytest.mark.slow
def test_an_answer_arrives_as_it_is_written(two, models) -> None:
    _, url = two
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    expected = models.pipeline.caption(PICTURES[0], num_beams=1)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="blip2", messages=[user("", PICTURES[0])], stream=True, temperature=0
        )
        if chunk.choices
    ]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 1


def num_rows(http: httpx.Client) -> float:
    """Of both replicas."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("blip2_rows{")]
    assert len(lines) == 2
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.slow
def test_who_hangs_up_is_not_written_for(two) -> None:
    _, url = two
    fields = {"messages": [user("", PICTURES[0])], "max_tokens": 450, "min_new_tokens": 450, "num_beams": 60}
    with httpx.Client(base_url=url, timeout=60) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=fields, timeout=httpx.Timeout(10, read=1))
        eventually(lambda: num_rows(http) == 0, 3)  # alone it takes longer by far


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced_and_the_other_answers_meanwhile(two) -> None:
    process, url = two
    with httpx.Client(base_url=url, timeout=60) as http:
        before = names(http)
        assert len(before) == 2
        os.kill(replicas_of(process)[0].pid, signal.SIGKILL)
        eventually(lambda: len(replicas_of(process)) == 1)

        def is_restored() -> bool:
            answer = http.post("/v1/chat/completions", json={"messages": [user("", PICTURES[0])]})
            assert answer.status_code == 200
            return answer.headers["x-blip2-replica"] not in before

        eventually(is_restored, 90)
        assert len(names(http)) == 2 and len(names(http) & before) == 1


@pytest.mark.slow
def test_what_dying_replicas_were_answering_is_a_503_or_the_end_of_a_stream(two) -> None:
    process, url = two
    fields = {"messages": [user("", PICTURES[0])], "max_tokens": 450, "min_new_tokens": 450}
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/chat/completions", json={**fields, "num_beams": 32}, timeout=60))

    def streamed() -> Iterator[str]:
        asked = {**fields, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
            yield from (line for line in response.iter_lines() if line)

    with httpx.Client(base_url=url, timeout=60) as http:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: num_rows(http) == 64)
        events = streamed()
        next(events)
        for replica in replicas_of(process):
            os.kill(replica.pid, signal.SIGKILL)
        *_, last = events
        for thread in threads:
            thread.join()
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_died"
        assert [answer.status_code for answer in answers] == [503, 503]
        assert {answer.json()["error"]["code"] for answer in answers} == {"replica_died"}
        assert {answer.headers["retry-after"] for answer in answers} == {"1"}
        assert http.get("/health").status_code == 200
        eventually(lambda: http.get("/ready").json().get("error", {}).get("code") == "no_replica")
        eventually(lambda: len(replicas_of(process)) == 2 and http.get("/ready").status_code == 200, 90)
        caption = http.post("/v1/chat/completions", json={"messages": [user("", PICTURES[0])]})
        assert caption.status_code == 200


@pytest.mark.slow
def test_silent_connections_and_large_bodies_end_at_the_front(two) -> None:
    _, url = two
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    silent = [socket.create_connection(address) for _ in range(64)]
    with httpx.Client(base_url=url, timeout=60) as http:
        answer = http.post("/caption", content=bytes(20 * 2**20 + 1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert "x-blip2-replica" not in answer.headers
        assert http.post("/caption", content=bytes(20 * 2**20)).headers["x-blip2-replica"]  # as large as may be
    for connection in silent:
        connection.settimeout(20)
        assert connection.recv(1) == b""
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_finishes_what_is_running_and_leaves_nobody_behind(opt_model, number) -> None:
    pytest.importorskip("ray")
    process = start("--replicas", "1", "-m", str(opt_model))
    try:
        line = process.stdout.readline()
        assert line.startswith("listening"), process.stderr.read()
        url = line.split()[2]
        processes = family(process)
        found = []
        fields = {"messages": [user("", PICTURES[0])], "num_beams": 64, "max_tokens": 95, "min_new_tokens": 95}
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(f"{url}/v1/chat/completions", json=fields, timeout=60))
        )
        thread.start()
        eventually(lambda: "} 64.0" in httpx.get(f"{url}/metrics").text.split("# TYPE blip2_rows")[1].split("#")[0])
        process.send_signal(number)
        thread.join(60)
        assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 95
        assert process.wait(60) == 0
        eventually(lambda: all_gone(processes), 20)
        assert process.stderr.read() == ""
    finally:
        process.kill()


@pytest.mark.slow
def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path) -> None:
    pytest.importorskip("ray")
    process = start("--replicas", "2", "-m", str(tmp_path / "nowhere"))
    try:
        output, error = process.communicate(timeout=120)
    finally:
        process.kill()
    with pytest.raises(CheckpointError) as raised:
        blip2.load(tmp_path / "nowhere")
    assert (process.returncode, output, error) == (1, "", f"blip2: {raised.value}\n")
