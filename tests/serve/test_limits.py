"""Each limit, and that it is enforced before the work that it guards."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib

import httpx
import pytest
from PIL import Image

from blip2.errors import OptionError
from blip2.serve.admission import Admission
from blip2.serve.limits import Limits
from tests.serve.conftest import PICTURES, Running, data_url, eventually, serving, slowed, user


def refused(response: httpx.Response, status: int, code: str) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error["message"]


@pytest.fixture(scope="module")
def narrow(models):
    """A server with every limit low."""
    limits = Limits(
        max_body_bytes=60_000, body_s=0.5, max_pixels=100_000, max_images=2, max_texts=2, max_prompt_tokens=40,
        max_new_tokens=20, max_rows=6,
    )  # fmt: skip
    with serving(lambda: models, limits=limits) as running:
        yield running


def png(width: int, height: int) -> bytes:
    """A header that claims a size, with next to nothing behind it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def raw(server: Running, head: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What the server says to bytes that no library would send."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head.replace("\n", "\r\n").encode())
        for part in parts:
            try:
                client.sendall(part)
            except OSError:  # it has hung up, as it may
                break
            time.sleep(pause_s)
        client.settimeout(10)
        heard = b""
        try:
            while chunk := client.recv(65536):
                heard += chunk
        except OSError:
            pass
    return heard


def test_a_body_that_says_that_it_is_too_large_is_not_read(narrow) -> None:
    head = "POST /caption HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 60001\n\n"
    heard = raw(narrow, head)  # nothing of it was sent, and the answer is there
    assert heard.startswith(b"HTTP/1.1 413") and b"body_too_large" in heard


def test_a_body_that_does_not_say_it_is_counted_while_it_comes(narrow) -> None:
    head = "POST /caption HTTP/1.1\nHost: x\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    heard = raw(narrow, head, *[chunk] * 20, pause_s=0.01)  # it never ends
    assert heard.startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_given_up(narrow) -> None:
    head = "POST /caption HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 100\n\n"
    began_s = time.monotonic()
    assert raw(narrow, head, b'{"image"').startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began_s < 5
    eventually(lambda: narrow.metric("blip2_requests_in_house") == 0)


def test_pixels_are_counted_before_they_are_decoded(narrow) -> None:
    before = narrow.metric("blip2_image_rejected_total", reason="image_too_large")
    for size in ((60_000, 60_000), (401, 250), (2**31 - 1, 1)):
        refused(narrow.http.post("/caption", files={"image": png(*size)}), 413, "image_too_large")
        refused(narrow.chat(user("", png(*size))), 413, "image_too_large")
    assert narrow.metric("blip2_image_rejected_total", reason="image_too_large") == before + 6
    assert narrow.http.post("/caption", files={"image": PICTURES[0].read_bytes()}).status_code == 200


@pytest.mark.parametrize("name", ["ICO", "PPM", "EPS"])
def test_only_the_formats_of_the_command_line_are_decoded(narrow, name) -> None:
    Image.new("RGB", (16, 16)).save(content := io.BytesIO(), name)
    refused(narrow.http.post("/caption", files={"image": content.getvalue()}), 415, "unsupported_image")


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_what_the_browser_says_of_a_picture_does_not_matter(narrow, name) -> None:
    Image.new("RGB", (16, 16)).save(content := io.BytesIO(), name)
    file = ("page.html", content.getvalue(), "text/html")
    assert narrow.http.post("/caption", files={"image": file}).status_code == 200


@pytest.mark.parametrize(
    "picture",
    ["file:///etc/passwd", "/etc/passwd", "../README.md", "ftp://example.org/a.png", "data:image/png,abc", "-",
     "data:image/png;base64,", "data:image/png;base64,%%%", "not base64!", "gopher://x", "\x00"],
)  # fmt: skip
def test_a_picture_is_bytes_and_no_name_of_a_file(narrow, picture) -> None:
    refused(narrow.http.post("/caption", json={"image": picture}), 400, "invalid_image")
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}
    refused(narrow.chat(message), 400, "invalid_image")


def test_web_addresses_are_off_by_default(narrow) -> None:
    asked = {"image": "http://127.0.0.1:1/a.png"}
    assert "--allow-images-from" in refused(narrow.http.post("/caption", json=asked), 400, "remote_images_disabled")


def test_pictures_and_texts_of_a_request_are_counted(narrow) -> None:
    url = data_url(png(8, 8))
    part = {"type": "image_url", "image_url": url}
    others = [{"type": "image_url", "image_url": data_url(png(8, width))} for width in (9, 10)]
    refused(narrow.chat({"role": "user", "content": [part, others[0]]}), 400, "one_image_only")
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a dog"}]
    others = [{"role": "user", "content": [other]} for other in others]
    refused(narrow.chat(*turns, others[0], turns[1], others[1]), 400, "too_many_images")
    refused(narrow.http.post("/v1/embeddings", json={"input": [{"image": url}] * 3}), 400, "too_many_images")
    refused(narrow.http.post("/v1/embeddings", json={"input": ["a"] * 3}), 400, "too_many_texts")
    refused(narrow.http.post("/match", json={"image": url, "texts": ["a"] * 3}), 400, "too_many_texts")


def test_tokens_are_counted(narrow) -> None:
    picture = png(8, 8)  # damaged: it would be refused if it were looked at first
    refused(narrow.chat(user("what " * 200, picture)), 400, "prompt_too_long")
    refused(narrow.chat(user("what is on the image " * 9, PICTURES[0])), 400, "prompt_too_long")
    refused(narrow.chat(user("", picture), num_beams=7), 400, "too_many_answers")
    refused(narrow.chat(user("", picture), n=7, temperature=1), 400, "too_many_answers")


def test_no_answer_is_longer_than_the_limit_and_it_says_so(narrow) -> None:
    for fields in ({"max_tokens": 4096}, {"max_completion_tokens": 10**30, "min_new_tokens": 600}):
        found = narrow.chat(user("", PICTURES[0]), **{"min_new_tokens": 20, **fields}).json()
        assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ("length", 20)
    fields = {"max_new_tokens": 600, "min_new_tokens": 599}
    found = narrow.http.post("/caption", files={"image": PICTURES[0].read_bytes()}, data=fields).json()
    assert found["finish_reason"] == "length"


def test_who_comes_when_the_house_is_full_is_sent_away_unread(tiny_models) -> None:
    limits = Limits(max_queue=3, max_rows=1)
    with slowed(tiny_models), serving(lambda: tiny_models, limits=limits) as server:
        answered = []
        fields = {"max_tokens": 30, "min_new_tokens": 30, "temperature": 0}
        threads = [
            threading.Thread(target=lambda: answered.append(server.chat(user("", PICTURES[0]), **fields)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.metric("blip2_requests_in_house") == 3)
        head = "POST /caption HTTP/1.1\nHost: x\nConnection: close\nContent-Length: 100\n\n"
        heard = raw(server, head)  # its body has not come yet
        assert heard.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in heard.lower()
        assert server.http.get("/health").status_code == server.http.get("/v1/models").status_code == 200
        for thread in threads:
            thread.join()
        assert [each.status_code for each in answered] == [200] * 3
        assert server.chat(user("", PICTURES[0]), max_tokens=2, temperature=0).status_code == 200


def test_keys(models, monkeypatch) -> None:
    with serving(lambda: models, keys=["first", "sécond"]) as server:

        def asked(path: str, value: str | None) -> int:
            headers = {} if value is None else {"Authorization": value.encode()}
            return server.http.get(path, headers=headers).status_code

        for value in (None, "", "Bearer", "Bearer firs", "Bearer first1", "first", "Basic first"):
            assert asked("/v1/models", value) == asked("/metrics", value) == asked("/openapi.json", value) == 401
        for value in ("Bearer first", "bearer first", "Bearer sécond"):
            assert asked("/v1/models", value) == 200
        for path in ("/health", "/ready", "/"):
            assert asked(path, None) == 200
        response = server.chat(user("", b"never looked at"))
        refused(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


def test_keys_are_compared_in_constant_time(monkeypatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: compared.append((one, other)) or one == other)
    keys = ["a", "b", "c"]
    door = Admission(None, limits=Limits(), metrics=FakeMetrics(), keys=keys, refusal=lambda: None, routes=[])
    assert door._has_key({"headers": [(b"authorization", b"Bearer a")]})
    assert compared == [(b"a", b"a"), (b"a", b"b"), (b"a", b"c")]  # all of them, though the first one fits


class FakeMetrics:
    class num_unanswered:
        @staticmethod
        def set_function(function) -> None: ...


def test_every_answer_forbids_what_browsers_might_make_of_it(server) -> None:
    for response in (server.http.get("/"), server.http.get("/health"), server.http.get("/nowhere"),
                     server.http.post("/caption", content=b"{")):  # fmt: skip
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "fields",
    [{"max_rows": 0}, {"deadline_s": 0}, {"max_body_bytes": -1}, {"cache_bytes": -1}, {"body_s": float("nan")}],
)
def test_a_limit_that_is_none(fields) -> None:
    with pytest.raises(OptionError, match=next(iter(fields))):
        Limits(**fields)


def test_json_in_the_answers_is_json(server) -> None:
    assert json.loads(server.http.get("/openapi.json").text)["openapi"].startswith("3.")
