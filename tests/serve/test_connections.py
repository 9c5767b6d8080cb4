"""Too many connections: which one is closed, and that a new one is always answered."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from blip2.serve.connection import MAX_HEADERS
from blip2.serve.connections import STARTS_PER_TURN, Activity, Connections, Lane, Starts, origin_of
from blip2.serve.limits import Limits
from blip2.serve.run import SPARE_DESCRIPTORS, affordable
from tests.serve.conftest import LONG, PICTURES, Running, eventually, serving, slowed, user

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MAX_CONNECTIONS = 12


@dataclass(eq=False)
class FakeConnection:
    name: str
    activity: Activity
    origin: str = "a"
    since_s: float = 0.0
    evicted: list[str] = field(default_factory=list)

    def evict(self) -> None:
        self.evicted.append(self.name)


SILENT, IDLE, BODY, UNREAD, WORK = Activity


@pytest.mark.parametrize(
    ("connection_fields", "expected"),
    [
        ([("old", WORK, "a", 0), ("body", BODY, "a", 1), ("idle", IDLE, "a", 2), ("new", SILENT, "a", 3)], "new"),
        ([("body", BODY, "a", 1), ("idle", IDLE, "a", 2), ("unread", UNREAD, "a", 0)], "idle"),
        ([("second", SILENT, "a", 2), ("first", SILENT, "a", 1)], "first"),
        ([("other", SILENT, "b", 0), ("one", IDLE, "a", 1), ("two", IDLE, "a", 2)], "one"),  # of the crowd
        ([("other", SILENT, "b", 0), ("busy", WORK, "a", 1), ("idle", IDLE, "a", 2)], "other"),  # work is no crowd
        ([("one", WORK, "a", 0), ("two", WORK, "b", 0)], None),
        ([("body", BODY, "a", 8), ("young", SILENT, "a", 9.5)], "body"),  # whose request may be on its way
        ([("young", SILENT, "a", 9.2), ("body", BODY, "a", 9.4)], "young"),
        ([("young", SILENT, "a", 9.5), ("idle", IDLE, "a", 9.8)], "idle"),
    ],
)
def test_which_connection_is_closed(connection_fields, expected) -> None:
    refused: list[str] = []
    connections = Connections(len(connection_fields), refused.append)
    gone: list[str] = []
    for each in connection_fields:
        connections.add(FakeConnection(*each, evicted=gone))
    assert gone == []
    connections.add(FakeConnection("new", SILENT, "z", 10))
    assert gone == ([expected] if expected else [])
    assert refused == ["connection_gave_way"] * len(gone)
    assert connections.count().total() == len(connection_fields) + 1 - len(gone)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"), (None, "local"), ("", "local"),
    ],
)  # fmt: skip
def test_origins(host, origin) -> None:
    assert origin_of(host) == origin


def test_requests_are_begun_a_few_at_a_time_and_those_ahead_of_their_turn_last() -> None:
    async def begun() -> list[list[Lane]]:
        loop = asyncio.get_running_loop()
        turns: list[list[Lane]] = [[]]
        starts = Starts()
        for lane in [Lane.AHEAD] * 5 + [Lane.FRESH] * 5 + [Lane.EXPRESS]:
            starts.add(loop, lambda lane=lane: turns[-1].append(lane), lane)
        while sum(map(len, turns)) < 11:
            turns.append([])
            await asyncio.sleep(0)
        return turns

    turns = asyncio.run(begun())
    assert max(map(len, turns)) <= STARTS_PER_TURN
    order = [lane for turn in turns for lane in turn][STARTS_PER_TURN:]  # those were begun when nothing else was there
    assert order == sorted(order) and order[0] == Lane.EXPRESS


@contextmanager
def connected(server: Running, *, origin: str = "127.0.0.1", says: bytes = b"") -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10, source_address=(origin, 0)) as client:
        client.sendall(says)
        yield client


@pytest.fixture(scope="module")
def small(models) -> Iterator[Running]:
    with serving(lambda: models, limits=Limits(max_connections=MAX_CONNECTIONS)) as running:
        yield running


@pytest.mark.parametrize(
    "says",
    [
        b"", b"GET / HT", GET, POST + b"Content-Length: 100\r\n\r\n{", GET * 4,
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        POST + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    ],
    ids=["silent", "head", "kept", "body", "several", "chunks", "expect"],
)  # fmt: skip
def test_a_new_connection_is_answered_however_many_there_are(small, says) -> None:
    with ExitStack() as crowd:
        for _ in range(3 * MAX_CONNECTIONS):
            crowd.enter_context(connected(small, says=says))
        with connected(small, says=GET) as new:
            assert new.recv(1000).startswith(b"HTTP/1.1 200")
        assert small.http.post("/caption", files={"image": PICTURES[0].read_bytes()}).status_code == 200
        assert small.metric("blip2_connections") <= MAX_CONNECTIONS * 5 // 4
    assert small.metric("blip2_requests_rejected_total", reason="connection_gave_way") >= MAX_CONNECTIONS


def test_while_all_connections_work_a_new_one_is_not_closed() -> None:
    gone: list[str] = []
    connections = Connections(8)
    for number in range(8):
        connections.add(FakeConnection(f"work {number}", WORK))
    for number in range(4):
        connections.add(FakeConnection(f"new {number}", SILENT, "b", 10 + number / 10, gone))
    assert gone == ["new 0", "new 1"]  # but there are not more than a quarter too many


def test_a_crowd_costs_nobody_else_a_connection(small) -> None:
    with connected(small, origin="127.0.0.2") as quiet, ExitStack() as crowd:
        for _ in range(3 * MAX_CONNECTIONS):
            crowd.enter_context(connected(small, says=GET))
        quiet.sendall(GET)
        assert quiet.recv(1000).startswith(b"HTTP/1.1 200")


def test_who_waits_for_an_answer_does_not_give_way(tiny_models) -> None:
    with slowed(tiny_models), serving(lambda: tiny_models, limits=Limits(max_connections=4)) as server:
        answered = []
        asking = threading.Thread(target=lambda: answered.append(server.chat(user("", PICTURES[0]), **LONG)))
        asking.start()
        eventually(lambda: server.metric("blip2_rows") == 1)
        with ExitStack() as crowd:
            for _ in range(20):
                crowd.enter_context(connected(server))
            asking.join()
        assert answered[0].status_code == 200
        assert server.service.metrics.text().count(b'reason="connection_gave_way"') > 0


def test_headers_are_counted(small) -> None:
    few, many = (GET[:-2] + b"a:\r\n" * number for number in (MAX_HEADERS - 1, MAX_HEADERS + 1))
    with connected(small, says=few + b"\r\n") as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    with connected(small, says=many) as client:
        heard = client.recv(1000)
        assert heard.startswith(b"HTTP/1.1 431") and b'"code": "too_many_headers"' in heard
    assert small.metric("blip2_requests_rejected_total", reason="too_many_headers") == 1


def test_what_is_no_http_is_told_so_in_our_words(small) -> None:
    with connected(small, says=b"hello\r\n\r\n") as client:
        heard = client.recv(1000)
    assert heard.startswith(b"HTTP/1.1 400") and b'"code": "bad_request"' in heard


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "raised"),
    [
        (20_000, 20_000, 1024, None), (256, 4096, 1024, 1024 + SPARE_DESCRIPTORS), (256, 1000, 500, 1000),
        (256, 256, 128, None), (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1024, None),
        (256, resource.RLIM_INFINITY, 1024, 1024 + SPARE_DESCRIPTORS), (2, 2, 1, None),
    ],
)  # fmt: skip
def test_descriptors_are_asked_for_and_some_kept(monkeypatch, soft, hard, expected, raised) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, both: limits.append(both))
    number, accepted = affordable(1024)
    assert number == expected and 1 <= accepted <= max(number // 4, 1)
    assert [each[0] for each in limits[1:]] == ([] if raised is None else [raised])
    assert all(each[1] == hard for each in limits)
