"""Ten thousand requests of many kinds, one in twenty of them malformed, at a server in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from blip2.serve.reading import NUM_FETCHERS
from blip2.serve.service import Models
from blip2.serve.worker import IDLE_S
from tests.serve.conftest import PICTURES, eventually
from tests.serve.test_limits import png

ROOT = Path(__file__).parents[2]
NUM_REQUESTS = int(os.environ.get("BLIP2_ABUSE_REQUESTS", "10000"))
NUM_CLIENTS = 32
MALFORMED_SHARE = 0.05
NUM_PICTURES = 400
CACHE_ENTRIES = 100
MAX_BODY_BYTES = 2_000_000
CORES = os.cpu_count() or 1
MAX_THREADS = (3 + NUM_FETCHERS + min(32, CORES + 4)) * CORES
"""The event loop, the model, its loader; two pools, which start a thread when all others are busy; and OpenMP's team of
each."""
SHORT = {"max_tokens": 8, "temperature": 0}
LONG = {"max_tokens": 300, "min_new_tokens": 300, "temperature": 0}
QUESTIONS = ("how many dogs are in the picture?", "what is in the picture?", "what color is the background?",
             "is there a boat in the picture?")  # fmt: skip
TEXTS = ("two dogs and a boat", "four cats", "a flower")
JSON = {"content-type": "application/json"}


@dataclass
class Tally:
    """What came of the requests."""

    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Client:
    http: httpx.AsyncClient
    host: str
    port: int


Send = Callable[[Client], Awaitable[str | None]]
"""Sends one request; what is wrong with the answer, or None."""


@dataclass(frozen=True)
class Case:
    kind: str
    send: Send


# ---- good requests, and what Python answers to the same ----


@dataclass(frozen=True)
class Asked:
    """An image, and the answers that it should get."""

    content: bytes
    question: str
    caption: str
    answer: str
    searched: str
    matches: list[float]


def picture(chance: random.Random, place: int) -> bytes:
    """A part of an example in some size and format; a few are large, one is a line."""
    if place == 0:
        image = Image.new("RGB", (1, 100_000), "blue")
    else:
        with Image.open(chance.choice(PICTURES)) as whole:
            width, height = whole.size
            left, upper = chance.randrange(width // 3), chance.randrange(height // 3)
            image = whole.convert("RGB").crop((left, upper, width, height))
        size = (2400, 1800) if place % 100 == 1 else (chance.randint(60, 300), chance.randint(60, 300))
        image = image.resize(size)
    image.save(stream := io.BytesIO(), chance.choice(["PNG", "JPEG", "WEBP"]) if place else "PNG")
    return stream.getvalue()


def in_python(models: Models, chance: random.Random) -> list[Asked]:
    contents = [picture(chance, place) for place in range(NUM_PICTURES)]
    questions = [chance.choice(QUESTIONS) for _ in contents]
    speak, match = models.pipeline, models.matcher
    assert match is not None
    greedy: dict[str, Any] = {"num_beams": 1, "max_new_tokens": SHORT["max_tokens"]}
    found = []
    for content, question in zip(contents, questions, strict=True):
        seen = speak.encode(content)
        caption = speak.caption(seen, min_new_tokens=1, **greedy)
        answer, searched = speak.ask(seen, question, **greedy), speak.ask(seen, question)
        [matches] = match.match(content, list(TEXTS)).itm_probability.tolist()
        found.append(Asked(content, question, caption, answer, searched, matches))
    return found


def good(chance: random.Random, pool: Sequence[Asked]) -> Case:
    asked = chance.choice(pool)
    url = f"data:;base64,{base64.b64encode(asked.content).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    alone = {"messages": [{"role": "user", "content": [image]}], "min_new_tokens": 1, **SHORT}
    about = {"messages": [{"role": "user", "content": [{"type": "text", "text": asked.question}, image]}], **SHORT}
    file = {"image": asked.content}
    form = {name: str(value) for name, value in SHORT.items()}
    chat, kinds = "/v1/chat/completions", {
        "chat, caption": lambda: answered(chat, asked.caption, json=alone),
        "chat, question": lambda: answered(chat, asked.answer, json=about),
        "chat, streamed": lambda: answered(chat, asked.answer, json={**about, "stream": True}),
        "caption, JSON": lambda: answered("/caption", asked.caption, json={"image": url, "min_new_tokens": 1, **SHORT}),
        "caption, form": lambda: answered("/caption", asked.caption, files=file, data={**form, "min_new_tokens": "1"}),
        "ask, JSON": lambda: answered("/ask", asked.answer, json={"image": url, "question": asked.question, **SHORT}),
        "ask, form": lambda: answered("/ask", asked.answer, files=file, data={**form, "question": asked.question}),
        "ask, searched": lambda: answered("/ask", asked.searched, files=file, data={"question": asked.question}),
        "match, JSON": lambda: matched(asked.matches, json={"image": url, "texts": TEXTS}),
        "match, form": lambda: matched(asked.matches, files=file, data={"texts": TEXTS}),
    }  # fmt: skip
    kind = chance.choice(list(kinds))
    return Case(kind, kinds[kind]())


def answered(path: str, expected: str, **request: Any) -> Send:
    async def send(client: Client) -> str | None:
        response = await client.http.post(path, **request)
        if response.status_code != 200:
            return f"{response.status_code} {response.text[:300]}"
        found = text_of(response)
        return None if found == expected else f"{found!r}, not {expected!r}"

    return send


def text_of(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
    found = response.json()
    return found["text"] if "text" in found else found["choices"][0]["message"]["content"]


def matched(expected: Sequence[float], **request: Any) -> Send:
    async def send(client: Client) -> str | None:
        response = await client.http.post("/match", **request)
        if response.status_code != 200:
            return f"{response.status_code} {response.text[:300]}"
        found = [each["itm_probability"] for each in response.json()["results"]]
        is_same = all(math.isclose(one, other, abs_tol=1e-4) for one, other in zip(found, expected, strict=True))
        return None if is_same else f"{found}, not {expected}"

    return send


# ---- malformed ones ----


def refused(path: str, *statuses: int, method: str = "POST", **request: Any) -> Send:
    """An error in the shape of all errors, with one of these statuses."""

    async def send(client: Client) -> str | None:
        response = await client.http.request(method, path, **request)
        told = f"{response.status_code} {response.text[:300]}"
        if response.status_code not in statuses:
            return f"{told}, not {statuses}"
        return None if set(response.json()["error"]) == {"message", "type", "param", "code"} else told

    return send


def base64_of(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def with_picture(chance: random.Random, content: bytes | str, *statuses: int) -> Send:
    """By any of the ways that an image can come."""
    url = content if isinstance(content, str) else base64_of(content)
    image = {"type": "image_url", "image_url": {"url": url}}
    ways = [
        lambda: refused("/v1/chat/completions", *statuses, json={"messages": [{"role": "user", "content": [image]}]}),
        lambda: refused("/caption", *statuses, json={"image": url}),
        lambda: refused("/match", *statuses, json={"image": url, "texts": TEXTS}),
        lambda: refused("/explain", *statuses, json={"image": url}),
        lambda: refused("/v1/embeddings", *statuses, json={"input": [{"image": url}]}),
    ]
    if isinstance(content, bytes):
        ways.append(lambda: refused("/ask", *statuses, files={"image": content}, data={"question": "what?"}))
    return chance.choice(ways)()


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content) * 9 // 10)]


def encoded(name: str, **options: Any) -> bytes:
    with Image.open(PICTURES[2]) as image:
        image.convert("RGB").save(stream := io.BytesIO(), name, **options)
    return stream.getvalue()


def broken_base64(chance: random.Random) -> Send:
    url = base64_of(PICTURES[0].read_bytes())
    place = chance.randrange(30, len(url))
    return with_picture(chance, url[:place] + chance.choice(["!", "\x00", "é", "=", "%zz"]) + url[place:], 400)


def bomb(chance: random.Random) -> Send:
    """A few bytes that claim to be, or would become, gigabytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head, end = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(30_000 * 3751), 9))
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    words = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    return chance.choice([
        lambda: with_picture(chance, png(60_000, 60_000), 413),
        lambda: with_picture(chance, png(2**31 - 1, 2**31 - 1), 413),
        lambda: with_picture(chance, head + chunk(b"IHDR", size) + rows + end, 413),
        lambda: with_picture(chance, head + small + words + end, 400),
        lambda: with_picture(chance, b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(20), 413,
                             415),
    ])()  # fmt: skip


def absurd_number(chance: random.Random) -> Send:
    name, value = chance.choice([
        ("max_tokens", -9), ("max_tokens", 1e308), ("max_tokens", "many"), ("max_tokens", True), ("max_tokens", 1.5),
        ("num_beams", 10**6), ("num_beams", -2), ("n", 10**9), ("n", 10**400), ("temperature", -1),
        ("temperature", 10**300), ("top_p", -1), ("top_p", 7), ("min_new_tokens", -5), ("min_new_tokens", 10**18),
        ("length_penalty", 1e30), ("repetition_penalty", -1), ("seed", -2), ("seed", 2**70), ("top_k", 0.5),
    ])  # fmt: skip
    path, fields = chance.choice([("/caption", {}), ("/ask", {"question": "what?"})])
    return refused(path, 400, json={"image": base64_of(PICTURES[0].read_bytes()), **fields, name: value})


def wrong_type(chance: random.Random) -> Send:
    wrong = chance.choice([None, 5, [], {}, True, [[]], {"a": {"b": []}}, 1.5])
    if chance.random() < 0.5:
        return refused("/v1/chat/completions", 400, json={"messages": wrong})
    return refused("/match", 400, json={"image": base64_of(PICTURES[0].read_bytes()), "texts": wrong})


def broken_json(chance: random.Random) -> Send:
    whole = json.dumps({"image": base64_of(PICTURES[0].read_bytes()), "question": "what?", "texts": TEXTS}).encode()
    content = chance.choice([cut(chance, whole), whole + b"}", whole.replace(b":", b"", 1), b"\xff" + whole, b"NaN"])
    path = chance.choice(["/caption", "/ask", "/match", "/explain", "/v1/chat/completions", "/v1/embeddings"])
    return refused(path, 400, content=content, headers=JSON)


def deep_nesting(chance: random.Random) -> Send:
    depth = chance.choice([10_000, 500_000])
    inner = chance.choice([b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth])
    content = chance.choice([inner, b'{"messages": ' + inner + b"}", b'{"image": ' + inner + b"}"])
    return refused(chance.choice(["/caption", "/v1/chat/completions"]), 400, 413, content=content, headers=JSON)


def broken_form(chance: random.Random) -> Send:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="texts"\r\n\r\na\r\n'
    return chance.choice([
        lambda: refused("/caption", 400, content=cut(chance, part + PICTURES[0].read_bytes()), headers=kind),
        lambda: refused("/caption", 400, content=b"\r\n".join([part] * 3) + b"\r\n--x--\r\n", headers=kind),
        lambda: refused("/match", 400, content=field * 1000 + b"--x--\r\n", headers=kind),
        lambda: refused("/match", 400, content=field + b"--x--\r\n", headers=kind),
        lambda: refused("/caption", 400, content=part, headers={"content-type": "multipart/form-data"}),
        lambda: refused("/caption", 400, files={"picture": PICTURES[0].read_bytes()}),
        lambda: refused("/caption", 400, files={"image": ("../" * 2000 + "passwd\x00.png", b"")}),
    ])()  # fmt: skip


def too_large(chance: random.Random) -> Send:
    async def pieces() -> Any:
        for _ in range(2 * MAX_BODY_BYTES // 2**16):
            yield b"x" * 2**16

    if chance.random() < 0.5:
        return refused("/caption", 413, content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)
    return refused("/caption", 413, content=pieces(), headers=JSON)


def somewhere_else(chance: random.Random) -> Send:
    image = base64_of(PICTURES[0].read_bytes())
    return chance.choice([
        lambda: refused("/nowhere", 404, json={}), lambda: refused("/caption", 405, method="GET"),
        lambda: refused("/health", 405, json={}), lambda: refused("/caption", 415, content=b"x", headers={
            "content-type": "text/plain"}),
        lambda: refused("/v1/embeddings", 404, json={"input": "a", "model": "gpt\r\n-4"}),
        lambda: refused("/caption", 400, json={"image": "http://127.0.0.1:1/a.png"}),
        lambda: refused("/caption", 400, json={"image": "/etc/passwd"}),
        lambda: refused("/ask", 400, json={"image": image, "question": "what is it? " * 9000}),
        lambda: refused("/match", 400, json={"image": image, "texts": ["a"] * 257}),
        lambda: refused("/v1/models/%00%ff", 404, method="GET"),
    ])()  # fmt: skip


def bytes_of(path: str, fields: dict[str, Any], length: int | None = None) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def hung_up(content: bytes, *, waits_for: bytes = b"", pause_s: float = 0.0, resets: bool = False) -> Send:
    """Sends this, waits, and is gone; nobody is there to hear an answer."""

    async def send(client: Client) -> str | None:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        problem = None
        try:
            writer.write(content)
            await writer.drain()
            if waits_for and waits_for not in (heard := await reader.readuntil(waits_for)):
                problem = f"{heard!r} without {waits_for!r}"
            await asyncio.sleep(pause_s)
            if resets:
                plain: socket.socket = writer.get_extra_info("socket")
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, asyncio.IncompleteReadError) as error:
            problem = f"{type(error).__name__} {error}"
        finally:
            writer.close()
        return problem

    return send


def half_a_body(chance: random.Random) -> Send:
    whole = bytes_of("/caption", {"image": base64_of(PICTURES[0].read_bytes())})
    chunked = b"POST /caption HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4000\r\n"
    return hung_up(
        chance.choice([whole[: chance.randrange(20, len(whole))], chunked + whole[: chance.randrange(1000)]]),
        pause_s=chance.choice([0, 0.05]),
        resets=chance.random() < 0.5,
    )


def late_body(chance: random.Random) -> Send:
    """The rest of it never comes: after a while, an answer says so."""
    return hung_up(bytes_of("/caption", {"image": "a"}, length=1000), waits_for=b" 408 ")


def no_http(chance: random.Random) -> Send:
    return chance.choice([
        lambda: hung_up(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", waits_for=b" 400 "),
        lambda: hung_up(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", waits_for=b" 400 "),
        lambda: hung_up(b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", waits_for=b" 400 "),
        lambda: hung_up(b"GET /health HT", pause_s=0.05),
    ])()  # fmt: skip


def impatient(chance: random.Random) -> Send:
    """A long answer, left while it is written."""
    image = {"type": "image_url", "image_url": {"url": base64_of(PICTURES[0].read_bytes())}}
    fields = {"messages": [{"role": "user", "content": [image]}], **LONG}
    resets = chance.random() < 0.5
    if chance.random() < 0.5:
        asked = bytes_of("/v1/chat/completions", {**fields, "stream": True})
        return hung_up(asked, waits_for=b"assistant", resets=resets)
    return hung_up(bytes_of("/v1/chat/completions", fields), pause_s=chance.choice([0, 0.05, 0.3]), resets=resets)


MALFORMED: dict[str, Callable[[random.Random], Send]] = {
    "broken base64": broken_base64,
    "cut PNG": lambda chance: with_picture(chance, cut(chance, PICTURES[2].read_bytes()), 400, 415),
    "cut JPEG": lambda chance: with_picture(chance, cut(chance, encoded("JPEG", quality=80)), 400, 415),
    "no image": lambda chance: with_picture(chance, chance.randbytes(chance.randint(1, 500)), 415, 400),
    "bomb": bomb,
    "absurd size": lambda chance: with_picture(
        chance, png(*chance.choice([(0, 0), (0, 5), (10**5, 10**5), (2**31 - 1, 1), (1, 50_000_001)])), 400, 413, 415
    ),
    "absurd number": absurd_number,
    "wrong type": wrong_type,
    "broken JSON": broken_json,
    "deep nesting": deep_nesting,
    "broken form": broken_form,
    "too large": too_large,
    "somewhere else": somewhere_else,
    "half a body": half_a_body,
    "late body": late_body,
    "no HTTP": no_http,
    "impatient": impatient,
}


# ---- the server, and what it takes ----


@dataclass(frozen=True)
class Taken:
    """By the server's process, while it has nothing to do."""

    resident_kb: int
    most_resident_kb: int
    num_threads: int
    num_files: int

    @classmethod
    def by(cls, process: int) -> Taken:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        numbers = [int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM", "Threads")]
        return cls(*numbers, len(os.listdir(f"/proc/{process}/fd")))


@pytest.fixture
def started(tmp_path) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """A server with the bundled models; its address, and what it logs."""
    log = tmp_path / "server.log"
    limits = ["--cache-entries", CACHE_ENTRIES, "--max-body-bytes", MAX_BODY_BYTES, "--body-timeout", 2]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "blip2", "serve", "--port", "0", *map(str, limits)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening at http://127.0.0.1:"), log.read_text()
        yield process, line.split()[2], log
    finally:
        process.kill()
        process.wait()


async def send_all(url: str, cases: Sequence[Case], tally: Tally) -> None:
    """By so many clients, each of which sends the next one when its last is answered."""
    host, port = url.removeprefix("http://").split(":")
    left = iter(cases)
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        client = Client(http, host, int(port))

        async def work() -> None:
            for case in left:
                try:
                    problem = await case.send(client)
                except Exception as error:
                    problem = f"{type(error).__name__} {error}"
                tally.kinds[case.kind] += 1
                if problem is not None:
                    tally.problems.append(f"{case.kind}: {problem}")

        await asyncio.gather(*(work() for _ in range(NUM_CLIENTS)))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_thousand_requests_one_in_twenty_malformed(models, started) -> None:
    """Nothing breaks, every good one is answered as Python answers it, and nothing is left behind.

    Memory is compared between the end of the first fifth and the end, both times with nothing to do. The first fifth
    is like the others: it has every kind of request in it, and has filled the image caches many times over.
    """
    process, url, log = started
    chance = random.Random(20_240)
    pool = in_python(models, chance)
    cases = [
        Case(kind := chance.choice(list(MALFORMED)), MALFORMED[kind](chance))
        if chance.random() < MALFORMED_SHARE else good(chance, pool)
        for _ in range(NUM_REQUESTS)
    ]  # fmt: skip
    tally, taken = Tally(), []
    with httpx.Client(base_url=url, timeout=30) as http:
        eventually(lambda: http.get("/ready").status_code == 200, 60)

        def metric(name: str) -> float:
            lines = http.get("/metrics").text.splitlines()
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and line[0] != "#")

        gauges = ("blip2_rows", *(f"blip2_requests_{name}" for name in ("running", "waiting", "in_house")))
        began_s = time.monotonic()
        for start in range(0, NUM_REQUESTS, NUM_REQUESTS // 5):
            asyncio.run(send_all(url, cases[start : start + NUM_REQUESTS // 5], tally))
            eventually(lambda: all(metric(f"{name} ") == 0 for name in gauges))
            eventually(lambda: Taken.by(process.pid).num_files <= (taken[0].num_files if taken else 10**6))
            time.sleep(2 * IDLE_S)
            taken.append(Taken.by(process.pid))
            print(f"\n{start + NUM_REQUESTS // 5:,} requests, {time.monotonic() - began_s:.0f} s: {taken[-1]}", end="")
        for kind, number in sorted(tally.kinds.items()):
            print(f"\n  {number:6,}  {kind}", end="")
        print(f"\n{metric('blip2_images_encoded_total'):,.0f} pictures encoded")
        assert process.poll() is None
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        assert not tally.problems, "\n".join(tally.problems[:20])
        assert sum(tally.kinds.values()) == NUM_REQUESTS
        assert not [line for line in http.get("/metrics").text.splitlines()
                    if line.startswith("blip2_request_seconds_count") and 'status="5' in line]  # fmt: skip
        assert metric("blip2_images_encoded_total") > 4 * CACHE_ENTRIES
    assert taken[-1].resident_kb <= 1.05 * taken[0].resident_kb
    assert taken[-1].num_files <= taken[0].num_files
    assert taken[-1].num_threads <= MAX_THREADS
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert set(log.read_text().splitlines()) <= {"WARNING:  Invalid HTTP request received."}
