"""Whatever is sent: an answer, and never an error of the server's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip2.serve.dialect import NAMES, REFUSED
from tests.serve.conftest import PICTURES, data_url, user

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PATHS = ("/v1/chat/completions", "/v1/embeddings", "/caption", "/ask", "/match", "/explain")
IMAGE = data_url(PICTURES[0])
GOOD = {
    "/v1/chat/completions": {"messages": [user("what is it?", PICTURES[0])], "max_tokens": 2},
    "/v1/embeddings": {"input": ["a dog"]}, "/caption": {"image": IMAGE, "max_tokens": 2},
    "/ask": {"image": IMAGE, "question": "what is it?", "max_tokens": 2},
    "/match": {"image": IMAGE, "texts": ["a dog"]},
    "/explain": {"image": IMAGE, "text": "a dog"},
}  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("data:image/png;base64,"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["type", "text", "image", "url"]), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


def check(response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@FEW
@given(data=st.data(), path=st.sampled_from(PATHS))
def test_fields_of_any_kind(server, data, path) -> None:
    names = st.sampled_from([*NAMES[path], *REFUSED, "unheard_of"])
    body = json.dumps({**GOOD[path], **data.draw(st.dictionaries(names, ANYTHING, min_size=1, max_size=2))})
    check(server.http.post(path, content=body.encode(), headers={"content-type": "application/json"}))


@FEW
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60), kind=st.sampled_from(
    ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "",
     "application/x-www-form-urlencoded"]))  # fmt: skip
def test_bytes_of_any_kind(server, path, body, kind) -> None:
    check(server.http.post(path, content=body, headers={"content-type": kind}))


@pytest.mark.parametrize("boundary", ["x" * 300, '"' + "\\" * 60_000])
def test_boundaries_that_are_too_long(server, boundary) -> None:
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    response = server.http.post("/caption", content=b"--x\r\n", headers=kind)
    check(response)
    assert response.json()["error"]["code"] == "invalid_form"


@FEW
@given(data=st.data())
def test_pictures_that_are_broken_anywhere(server, data) -> None:
    content = bytearray(PICTURES[data.draw(st.integers(0, 2))].read_bytes())
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    fields = {"max_tokens": "1", "num_beams": "1"}
    check(server.http.post("/caption", files={"image": bytes(content[:end])}, data=fields))


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": ' + b"[" * 20_000, b"[" * 100_000 + b"]" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"question": "\\ud800", "image": "\\ud800"}', b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
        b'{"temperature": 1e999}', b'{"temperature": NaN}', b"\xff\xfe", b"null", b"[]", b'"a"', b"", b"{}" * 2,
        b'{"model": "\\ud800"}', b'{"\\ud800": 1}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_json_that_breaks_parsers(server, path, body) -> None:
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize("encoding", ["undefined", "idna", "utf-16", "hex", "unheard-of", "\ud800"])
def test_forms_in_any_encoding(server, encoding) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\n\xff\xfe\r\n--x--\r\n'
    kind = f"multipart/form-data; boundary=x; charset={encoding}".encode("utf-8", "replace")
    response = server.http.post("/ask", content=form, headers={"content-type": kind})
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("path", "before", "item", "after"),
    [
        ("/v1/embeddings", b'{"input": [', b"{}", b"]}"),
        ("/match", b'{"image": "a", "texts": [', b"[]", b"]}"),
        ("/v1/chat/completions", b'{"messages": [', b"{}", b"]}"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [', b"{}", b"]}]}"),
        ("/caption", b'{"image": "a", "stop": [', b"[]", b"]}"),
    ],
)
def test_what_is_wrong_with_a_million_items_is_told_of_one(server, path, before, item, after) -> None:
    """To tell of each took gigabytes, and half a minute in which nobody else was answered."""
    body = before + b",".join([item] * 1_000_000) + after
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    check(response)
    more = re.search(r"\(and (\d+) more\)", response.json()["error"]["message"])
    assert response.status_code == 400 and (more is None or int(more[1]) < 10)


@pytest.mark.parametrize("name", ["max_tokens", "num_beams", "temperature", "seed", "max_completion_tokens"])
def test_true_is_no_number(server, name) -> None:
    fields = {"messages": [user("", PICTURES[0])], name: True}
    response = server.http.post("/v1/chat/completions", json=fields)
    check(response)
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    assert "a number, not true or false" in response.json()["error"]["message"]


def test_a_path_that_is_almost_right_leads_nowhere_else(server) -> None:
    response = server.http.post("/caption/", json={}, headers={"host": "evil.example"})
    assert response.status_code == 404 and "location" not in response.headers


@pytest.mark.parametrize("text", ["\ud800", "a\ud800b", "\x00", "\u202e", "\U0010ffff", "🐕" * 50, "\u0301" * 300])
def test_questions_of_any_letters(server, text) -> None:
    body = json.dumps({"messages": [user(text, PICTURES[0])], "max_tokens": 2}).encode()
    check(server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"}))


@pytest.mark.slow
def test_schemathesis_finds_no_error_of_the_server(server) -> None:
    schemathesis = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [str(schemathesis), "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
         "--max-examples", "60", "--request-timeout", "30", "--seed", "1", "--no-color"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_afterwards_everything_is_free(server, models) -> None:
    for name in ("blip2_rows", "blip2_requests_running", "blip2_requests_waiting", "blip2_requests_in_house"):
        assert server.metric(name) == 0
    assert server.metric("blip2_request_seconds_count", status="500") == 0
    found = server.chat(user("", PICTURES[0])).json()
    assert found["choices"][0]["message"]["content"] == models.pipeline.caption(PICTURES[0])
