"""Connections on which next to nothing comes or goes, or too much: none is held for ever, none fills the memory."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blip2.serve.connection import MAX_HEAD_BYTES, MAX_PIPELINED, Connection
from blip2.serve.limits import Limits
from tests.serve.conftest import LONG, PICTURES, Running, data_url, eventually, serving, slowed, user

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Hasty(Connection):
    head_s = 0.3
    stall_s = 0.3


@pytest.fixture(scope="module")
def hasty(models) -> Iterator[Running]:
    limits = Limits(max_body_bytes=3_000_000, max_texts=3000)
    with serving(lambda: models, http=Hasty, limits=limits) as running:
        yield running


@contextmanager
def connected(server: Running, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(10)
        client.connect((host, int(port)))
        yield client


def heard_until_closed(client: socket.socket) -> bytes:
    heard = b""
    try:
        while chunk := client.recv(65536):
            heard += chunk
    except ConnectionError:
        pass
    return heard


def test_who_says_nothing_is_not_waited_for(hasty) -> None:
    with connected(hasty) as client:
        assert heard_until_closed(client) == b""


def test_a_head_that_comes_byte_by_byte_is_given_up(hasty) -> None:
    with connected(hasty) as client, pytest.raises(OSError):
        client.sendall(GET)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(200):
            client.sendall(b"X-A: b\r\n")
            time.sleep(0.05)


def test_a_slow_head_that_comes_in_time_is_answered(hasty) -> None:
    with connected(hasty) as client:
        for place in range(0, len(GET), 10):
            client.sendall(GET[place : place + 10])
            time.sleep(0.01)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.4)  # longer than a head may take: the time does not run while nothing is sent
        client.sendall(GET)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_long_answer_is_not_a_slow_head(tiny_models) -> None:
    with slowed(tiny_models), serving(lambda: tiny_models, http=Hasty) as server:
        assert server.chat(user("", PICTURES[0]), **LONG).status_code == 200


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Endless: ", b"GET /health?",
        b"GET /health HTTP/1.1\r\nHost: x\r\n", POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2;", POST + b"Transfer-Encoding: chunked\r\n\r\n1;",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n ",
    ],
    ids=["value", "address", "lines", "trailers", "chunk", "chunks", "answered"],
)  # fmt: skip
def test_what_is_no_body_is_counted(server, begun) -> None:
    piece = b"X-A: b\r\n" * 1000 if begun.endswith(b"\n") else b"a" * 8000
    if begun.endswith(b"1;"):
        piece += b"\r\n \r\n1;"  # a byte of a body in each piece
    with connected(server) as client:
        client.sendall(begun)
        num_sent = 0
        with pytest.raises(OSError):
            while num_sent < 100 * MAX_HEAD_BYTES:
                client.sendall(piece)
                num_sent += len(piece)
    assert num_sent < 100 * MAX_HEAD_BYTES


def test_a_body_in_many_small_chunks_is_read(server, models) -> None:
    body = json.dumps({"image": data_url(PICTURES[0])}).encode()
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for at in range(0, len(body), 5) if (piece := body[at : at + 5])]
    with connected(server) as client:
        client.sendall(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"".join(chunks) + b"0\r\n\r\n")
        heard = heard_until_closed(client)
    assert json.loads(heard.partition(b"\r\n\r\n")[2])["text"] == models.pipeline.caption(PICTURES[0])


def test_several_requests_at_once_are_answered_in_their_order(server) -> None:
    with connected(server) as client:
        client.sendall(GET * 3 + GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert heard_until_closed(client).count(b'{"status":"ok"}') == 4
    with connected(server) as client:
        client.sendall(GET * 5000)
        assert heard_until_closed(client).count(b"HTTP/1.1 200") <= MAX_PIPELINED + 1


def test_who_asks_twice_at_once_and_hangs_up_frees_the_rows(tiny_models) -> None:
    body = json.dumps({"messages": [user("", PICTURES[0])], **LONG}).encode()
    asked = POST.replace(b"/caption", b"/v1/chat/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with slowed(tiny_models) as steps, serving(lambda: tiny_models) as server:
        with connected(server) as client:
            client.sendall(asked * 2)
            eventually(lambda: server.metric("blip2_rows") == 1)
        eventually(lambda: server.metric("blip2_requests_in_house") == server.metric("blip2_rows") == 0)
        assert steps() < LONG["max_tokens"] / 2


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_an_answer_that_nobody_reads_is_dropped(hasty, header) -> None:
    body = json.dumps({"input": ["a"] * 3000}).encode()
    head = POST.replace(b"/caption", b"/v1/embeddings") + header
    asked = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    whole = len(hasty.http.post("/v1/embeddings", content=body, headers={"content-type": "application/json"}).content)
    of_route = {"route": "/v1/embeddings", "status": "200"}
    before = hasty.metric("blip2_request_seconds_count", **of_route)
    with connected(hasty, receive_buffer=4096) as client:
        client.sendall(asked)
        eventually(lambda: hasty.metric("blip2_request_seconds_count", **of_route) > before)
        time.sleep(1)
        num_heard = len(heard_until_closed(client))
    assert num_heard < whole
    assert hasty.http.get("/health").status_code == 200


def test_who_is_still_sending_hears_why_it_is_too_much(server) -> None:
    """A connection that is closed with something unread on it is reset, and the answer lost."""
    with connected(server) as client:
        client.sendall(POST + b"Content-Length: 200000000\r\n\r\n")
        for _ in range(100):
            client.sendall(b"x" * 100_000)
            time.sleep(0.001)
        assert b"HTTP/1.1 413" in client.recv(1000)


def test_what_is_refused_is_not_listened_to_for_ever(server) -> None:
    with connected(server) as client, pytest.raises(OSError):
        client.sendall(POST + b"Content-Length: 200000000\r\n\r\n")
        for _ in range(2000):
            client.sendall(b"x" * 10_000)
            time.sleep(0.01)
