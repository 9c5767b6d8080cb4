"""The server's log: what a line tells, what it never tells, and that it stops nobody."""

from __future__ import annotations

import io
import logging
import os
import re
import threading

import pytest

from blip2.errors import NotFiniteError
from blip2.serve.log import CAPACITY, current_id, logging_at
from tests.serve.conftest import PICTURES, eventually, serving

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR|DEBUG) (\S+) (.*)")
SECRET = "sk-very-secret"


@pytest.fixture
def heard() -> io.StringIO:
    return io.StringIO()


def lines(heard: io.StringIO) -> list[str]:
    return heard.getvalue().splitlines()


def test_a_line_a_request_that_tells_nothing_of_what_was_said(models, heard) -> None:
    with logging_at("info", heard), serving(lambda: models, keys=[SECRET]) as server:
        server.http.headers["Authorization"] = f"Bearer {SECRET}"
        with PICTURES[0].open("rb") as file:
            fields = {"question": "where are the diamonds?"}
            asked = server.http.post("/ask", files={"image": file}, data=fields, headers={"X-Request-Id": "mine-1"})
        models_answer = server.http.get("/v1/models/miniature")
        nowhere = server.http.get(f"/{SECRET}%0aINFO/diamonds?key={SECRET}")
        wrong = server.http.get("/v1/models", headers={"Authorization": "Bearer diamonds"})
        server.http.get("/health")
    assert asked.headers["x-request-id"] == "mine-1"
    told = [LINE.fullmatch(line) for line in lines(heard)]
    assert all(told) and len(told) == 4
    assert re.fullmatch(r"POST /ask 200 \d+ ms in=1\d{4} out=\d+", told[0][3]) and told[0][2] == "mine-1"
    expected = ["GET /v1/models/{name} 200", "GET other 404", "GET /v1/models 401"]
    for line, answer, start in zip(told[1:], (models_answer, nowhere, wrong), expected, strict=True):
        assert line[3].startswith(start) and line[2] == answer.headers["x-request-id"]
    assert not re.search("secret|diamonds|miniature", heard.getvalue())


@pytest.mark.parametrize("given", ["a b", "a\tb", "é", "x" * 65, "", "a;b", "<a>"])
def test_an_odd_name_of_a_request_is_not_kept(server, given) -> None:
    answer = server.http.get("/health", headers={"X-Request-Id": given.encode()})
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
    twice = server.http.get("/health", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert re.fullmatch("[0-9a-f]{16}", twice.headers["x-request-id"])


def test_what_failed_is_found_by_its_id_and_answered_like_every_error(models, heard, monkeypatch) -> None:
    with logging_at("info", heard), serving(lambda: models) as server:

        def broken(*arguments: object) -> None:
            raise RuntimeError("broken\nINFO forged \x1b[31m line")

        monkeypatch.setattr(server.service, "answers", broken)
        with PICTURES[0].open("rb") as file:
            answer = server.http.post("/caption", files={"image": file})
        assert server.metric("blip2_request_seconds_count", route="/caption", status="500") == 1
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-content-type-options"] == "nosniff"
    name = answer.headers["x-request-id"]
    found = lines(heard)
    assert f"ERROR {name} a request failed" in found[0] and f"WARNING {name} POST /caption 500" in found[-1]
    assert all(line.startswith("    ") for line in found[1:-1])
    assert any("forged \\x1b[31m line" in line for line in found)
    assert sum("Traceback" in line for line in found) == 1


def test_levels(server, heard) -> None:
    def after(level: str) -> list[str]:
        heard.seek(heard.truncate(0))
        with logging_at(level, heard):
            server.http.get("/health")
            server.http.get("/nowhere")
            logging.getLogger("blip2.serve").error("the model is gone: %s", NotFiniteError("a\u2028b\rc"))
        return [line.split(" ", 4)[4] for line in lines(heard)]

    gone = "the model is gone: a\\u2028b\\rc"
    assert after("error") == after("warning") == [gone]
    assert [line.split(" ")[1] for line in after("info")] == ["other", "model"]
    assert [line.split(" ")[1] for line in after("debug")] == ["/health", "other", "model"]


def test_a_pipe_that_nobody_reads_stops_nobody() -> None:
    reads, writes = os.pipe()
    with open(writes, "w") as stream, logging_at("info", stream):
        logger = logging.getLogger("blip2.serve")
        current_id.set("-")
        for _ in range(2 * CAPACITY):
            logger.warning("x" * 100)
        taken: list[str] = []
        reader = threading.Thread(target=lambda: taken.extend(open(reads)), daemon=True)  # noqa: SIM115
        reader.start()
        eventually(lambda: len(taken) > CAPACITY)
        logger.warning("at last")
        eventually(lambda: any("lines are missing here" in line for line in taken))
    reader.join(5)
    assert "at last" in taken[-1] and len(taken) < 2 * CAPACITY
