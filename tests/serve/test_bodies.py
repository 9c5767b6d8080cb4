"""Bodies that come slowly, or many at a time: they take nobody's place, and all of them together are bounded."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from blip2.errors import OptionError
from blip2.serve.admission import CLIENT, RELEASE, Admission
from blip2.serve.bodies import PIECES_PER_TURN, Bodies
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.places import Places
from tests.serve.conftest import PICTURES, Running, data_url, eventually, serving

POST = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
CAPTION = json.dumps({"image": data_url(PICTURES[0])}).encode()


@contextmanager
def sending(server: Running, head: bytes, body: bytes) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(POST + head + b"\r\n" + body)
        yield client


def heard(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("head", [b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_body_that_has_not_come_takes_nobodys_place(models, head) -> None:
    with serving(lambda: models, limits=Limits(max_queue=2)) as server, ExitStack() as stalled:
        for _ in range(10):
            stalled.enter_context(sending(server, head, b"{" if b"Length" in head else b"1\r\n{\r\n"))
        eventually(lambda: server.metric("blip2_connections", state="body") == 10)
        assert server.metric("blip2_requests_in_house") == 0
        assert server.http.post("/caption", json={"image": data_url(PICTURES[0])}).status_code == 200


def test_a_place_is_asked_for_again_when_the_body_is_there(models) -> None:
    with serving(lambda: models, limits=Limits(max_queue=1)) as server:
        with sending(server, b"Content-Length: 2\r\n", b"{") as client:
            eventually(lambda: server.metric("blip2_connections", state="body") == 1)
            with serving_one(server):
                client.sendall(b"}")
                assert b"HTTP/1.1 429" in (answer := heard(client)) and b"queue_full" in answer
        assert server.metric("blip2_requests_rejected_total", reason="queue_full") == 1


@contextmanager
def serving_one(server: Running) -> Iterator[None]:
    """All places are taken meanwhile."""
    server.service.places._taken["somebody else"] += 1
    yield
    server.service.places._taken.clear()


def test_the_oldest_body_that_still_comes_gives_way(models) -> None:
    size = len(CAPTION)
    limits = Limits(max_body_bytes=size + 100, max_flight_bytes=3 * size)
    with serving(lambda: models, limits=limits) as server, ExitStack() as stalled:
        clients = []
        for number in range(2):
            head = b"Content-Length: %d\r\n" % size
            clients.append(stalled.enter_context(sending(server, head, CAPTION[:-1])))
            eventually(lambda number=number: server.metric("blip2_body_bytes") == (number + 1) * (size - 1))
        # A third would be more than one client's share, though not too much in all.
        assert server.http.post("/caption", content=CAPTION, headers={"content-type": "application/json"}).is_success
        answer = heard(clients[0])
        assert answer.startswith(b"HTTP/1.1 503") and b"body_gave_way" in answer and b"retry-after" in answer
        clients[1].sendall(CAPTION[-1:])
        assert heard(clients[1]).startswith(b"HTTP/1.1 200")
        eventually(lambda: server.metric("blip2_body_bytes") == 0)
        assert server.metric("blip2_requests_rejected_total", reason="body_gave_way") == 1


def test_a_body_that_hardly_comes_is_given_up_early(models, monkeypatch) -> None:
    monkeypatch.setattr("blip2.serve.bodies.GRACE_S", 0.3)
    with serving(lambda: models) as server:
        with sending(server, b"Content-Length: 100\r\n", b"{") as slow:
            answer = heard(slow)
        assert answer.startswith(b"HTTP/1.1 408") and b"too slowly" in answer
        # Slow, but no slower than the slowest telephone.
        with sending(server, b"Content-Length: %d\r\n" % len(CAPTION), b"") as steady:
            for at in range(0, len(CAPTION), len(CAPTION) // 8):
                steady.sendall(CAPTION[at : at + len(CAPTION) // 8])
                time.sleep(0.06)
            assert heard(steady).startswith(b"HTTP/1.1 200")


def post(client: Any = ("192.0.2.1", 1), **headers: str) -> dict[str, Any]:
    found = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": "/caption", "headers": found, "client": client}


def ask(door: Admission, scope: dict[str, Any], *parts: bytes) -> list[dict[str, Any]]:
    """What comes of a request whose body comes in parts."""
    coming = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    coming.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(door(scope, receive, send))
    return sent


def door_of(app: Callable[..., Any], limits: Limits | None = None, **others: Any) -> Admission:
    others = {"keys": [], **others}
    return Admission(app, limits=limits or Limits(), metrics=Metrics(), refusal=lambda: None, routes=[], **others)


def test_the_bytes_are_the_applications_alone_once_it_has_them() -> None:
    bodies = Bodies(Limits())
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(bodies.num_bytes)
        message = await receive()
        found.extend((message["body"] == b"ab" * 500, sys.getrefcount(message["body"])))
        scope[RELEASE]()
        scope[RELEASE]()
        found.append(bodies.num_bytes)

    ask(door_of(app, bodies=bodies), post(), b"ab" * 250, b"ab" * 250)
    assert found == [1000, True, 2, 0]  # the message's reference, and that of the question


@pytest.mark.parametrize(
    ("client", "key", "expected"),
    [(("192.0.2.1", 9), None, "192.0.2.1"), (("2001:db8::1:2", 9), None, "2001:db8::/64"), (None, None, "local"),
     (("192.0.2.1", 9), "secret", "digest")],
)  # fmt: skip
def test_the_application_hears_who_asks(client, key, expected) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope[CLIENT])

    door = door_of(app, keys=[key, "other"] if key else [])
    ask(door, post(client, authorization=f"Bearer {key}"))
    ask(door, post(client, authorization=f"Bearer {key}"))
    if key is None:
        assert seen == [expected] * 2
    else:
        ask(door, post(client, authorization="Bearer other"))
        assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 12 and key not in seen[0]


def test_one_client_does_not_have_all_places() -> None:
    async def taken(max_queue: int) -> int:
        places = Places(Limits(max_queue=max_queue))
        async with asyncio.timeout(5):
            holding = [places.taken("a", time.monotonic() + 9) for _ in range(max_queue)]
            number = 0
            for each in holding:
                try:
                    await each.__aenter__()
                except ApiError as error:
                    assert (error.status, error.code) == (429, "client_queue_full")
                    places.check("b")
                    break
                number += 1
            for each in holding[:number]:
                await each.__aexit__(None, None, None)
        assert len(places) == 0
        return number

    assert [asyncio.run(taken(number)) for number in (1, 2, 3, 4, 8, 128)] == [1, 2, 3, 3, 6, 96]


def test_what_is_in_work_long_after_its_deadline_is_ended(monkeypatch) -> None:
    """Its route should have said so before; but nothing holds a place for ever."""
    monkeypatch.setattr("blip2.serve.places.SPARE_S", 0.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    sent = ask(door_of(app, Limits(deadline_s=0.05)), post(), b"{}")
    assert sent[0]["status"] == 504 and b'"deadline"' in sent[1]["body"]


def test_bytes_in_flight_hold_one_body_at_least() -> None:
    assert Limits().flight_bytes == 16 * Limits().max_body_bytes
    with pytest.raises(OptionError, match="max_flight_bytes is 10, less than max_body_bytes"):
        Limits(max_flight_bytes=10)


def test_many_large_bodies_are_received_a_little_at_a_time_and_in_turn() -> None:
    """Else a turn of the event loop takes longer the more of them come, and nobody else is answered meanwhile."""

    async def received() -> list[tuple[str, int]]:
        bodies, found, num_turns = Bodies(Limits()), [], 0

        async def receive(client: str) -> None:
            for _ in range(4):
                await bodies.turn(client)
                found.append((client, num_turns))

        several = asyncio.gather(*map(receive, ["many"] * 20), receive("one"))
        while not several.done():
            num_turns += 1
            await asyncio.sleep(0)
        return found

    found = asyncio.run(received())
    assert len(found) == 84
    assert max(Counter(turn for _, turn in found).values()) == PIECES_PER_TURN
    assert [client for client, _ in found[:16]].count("one") == 4


def test_what_gave_way_is_let_go_at_once() -> None:
    """What was received of it, even while the client is told."""

    async def run() -> None:
        bodies = Bodies(Limits(max_body_bytes=2**20, max_flight_bytes=2**20))
        old, new = bodies.begin("old"), bodies.begin("new")

        async def stalls() -> Any:
            if old.num_bytes:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": bytes(600_000), "more_body": True}

        async def comes() -> Any:
            return {"type": "http.request", "body": bytes(600_000)}

        stalled = asyncio.create_task(old.receive({"headers": []}, stalls, Limits()))
        while not old.num_bytes:
            await asyncio.sleep(0)
        assert await new.receive({"headers": []}, comes, Limits())
        with pytest.raises(ApiError, match="took longest"):
            await stalled
        assert not old._pieces and bodies.num_bytes == 600_000

    asyncio.run(run())


@pytest.mark.parametrize(("method", "path", "status"), [
    ("PUT", "/caption", 405), ("GET", "/health", 200), ("OPTIONS", "/caption", 204), ("PATCH", "/nowhere", 404),
])  # fmt: skip
def test_the_answer_reaches_who_sends_a_body_that_no_route_takes(models, method, path, status) -> None:
    """All of it, though the answer was there before."""
    with serving(lambda: models) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n".encode())
            for _ in range(30):
                time.sleep(0.01)
                client.sendall(b"x" * 100_000)
            assert client.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())
