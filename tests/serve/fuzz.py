"""Requests that no client sends, by chance: fields, forms and images that are changed until little of them is right.

As a program: ``python -m tests.serve.fuzz PORT SEED FIRST LAST``. Each request is made from the seed and its number, so
that one that broke something can be sent again. Prints how often it got which status, and what was wrong, as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from tests.serve import bombs
from tests.serve.attacks import ASK, CAPTION, CHAT, EMBEDDINGS, ENCODED, EXPLAIN, FORM, JSON, MATCH, address, form

MOST_BYTES = 39_800_000
NUM_CLIENTS = 12
ROUTES = (CAPTION, ASK, MATCH, EXPLAIN, CHAT, EMBEDDINGS)
BIG = 0.02
"""The share of what is made large."""
KINDS = (
    JSON, FORM, ENCODED, "", "text/plain", "application/json; charset=utf-16", "multipart/form-data", "image/png",
    "multipart/form-data; boundary=\xe9", "multipart/mixed; boundary=xyz", "APPLICATION/JSON;;",
)  # fmt: skip
LETTERS = ("a", " ", "\0", "é", "\uac00", "\U0001f600", "\ud83d", '"', "\\", "\n", "a\u0301", "%41", "<", "%", "1,")


# ---- values ----


def text(chance: random.Random) -> str:
    times = chance.choice([0, 1, 2, 30, 3000] if chance.random() > BIG else [200_000, 3_000_000])
    return chance.choice(LETTERS) * times


def number(chance: random.Random) -> Any:
    return chance.choice([
        0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, -(2**63),
        10**300, 64, 512, 513, True, False, chance.randrange(100), chance.random(),
    ])  # fmt: skip


def value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(10 if depth < 4 else 6)
    if kind < 2:
        return number(chance)
    if kind < 4:
        return text(chance)
    if kind == 4:
        return None
    if kind == 5:
        return nested(chance)
    if kind < 8:
        width = chance.randrange(5) if chance.random() > BIG else 6000
        return [value(chance, depth + 1)] * width if width > 5 else [value(chance, depth + 1) for _ in range(width)]
    return {key(chance): value(chance, depth + 1) for _ in range(chance.randrange(4))}


def large(chance: random.Random) -> Any:
    size = chance.choice([300_000, 1_000_000, 6_000_000])
    return chance.choice([
        lambda: chance.choice(LETTERS) * size, lambda: [number(chance)] * (size // 20),
        lambda: [chance.choice(LETTERS) * 30] * (size // 50), lambda: {str(each): each for each in range(size // 20)},
        lambda: [nested(chance)] * 300, lambda: [{"type": "text", "text": "a"}] * (size // 40),
        lambda: [address(picture(chance))] * 40, lambda: [{"role": "user", "content": "a"}] * (size // 40),
    ])()  # fmt: skip


def nested(chance: random.Random) -> Any:
    found: Any = 1
    for _ in range(chance.choice([3, 30, 60, 300, 800])):
        found = [found] if chance.random() < 0.5 else {"a": found}
    return found


def key(chance: random.Random) -> str:
    return chance.choice([
        "image", "question", "texts", "messages", "input", "prompt", "max_tokens", "n", "num_beams", "stop", "seed",
        "temperature", "model", "stream", "tools", "response_format", "logprobs", "top_logprobs", "content", "role",
        "type", "image_url", "url", "caption", "word", "answer", "text", "", "\0", "__class__", text(chance)[:100],
    ])  # fmt: skip


# ---- requests ----


@cache
def small_pictures() -> list[bytes]:
    image = Image.open(io.BytesIO(bombs.innocent())).convert("RGB").resize((40, 30))
    found = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, name, options in [
        ("RGB", "PNG", {}), ("P", "PNG", {"transparency": 3}), ("I;16", "PNG", {}), ("LA", "PNG", {}), ("1", "PNG", {}),
        ("RGB", "JPEG", {"progressive": True, "exif": exif}), ("CMYK", "JPEG", {}), ("L", "JPEG", {}), ("P", "GIF", {}),
        ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True}), ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("L", "TIFF", {"compression": "jpeg"}), ("1", "TIFF", {"compression": "group4"}), ("I;16", "TIFF", {}),
        ("F", "TIFF", {}), ("RGB", "BMP", {}), ("P", "BMP", {}), ("RGB", "AVIF", {"speed": 10}),
    ]:  # fmt: skip
        changed = image.convert("L").convert(mode) if mode in ("I;16", "F", "LA", "1") else image.convert(mode)
        found.append(bombs.saved(changed, name, **options))
    return found


def changed(chance: random.Random, content: bytes) -> bytes:
    """Bytes that are turned, left out, doubled or put in; mostly near the beginning."""
    found, odd = bytearray(content), [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1"]
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        if not found:
            break
        place = min(int(chance.expovariate(1 / chance.choice([20, 200, 5000]))), len(found) - 1)
        match chance.randrange(6):
            case 0:
                found[place] = chance.randrange(256)
            case 1:
                found[place] ^= 1 << chance.randrange(8)
            case 2:
                del found[place : place + chance.choice([1, 4, 100])]
            case 3:
                found[place:place] = found[place : place + chance.choice([1, 4, 100, 3000])]
            case 4:
                found[place:place] = chance.choice([*odd, b"\xff\xd8\xff", chance.randbytes(9)])
            case 5:
                found[place : place + 4] = chance.choice(odd)
    if chance.random() < 0.1:
        del found[chance.randrange(len(found) + 1) :]
    return bytes(found) * (chance.choice([10, 1000]) if chance.random() < BIG and len(found) < 10_000 else 1)


def picture(chance: random.Random) -> bytes:
    content = chance.choice(small_pictures())
    return content if chance.random() < 0.3 else changed(chance, content)


def sound(chance: random.Random, route: str) -> dict[str, Any]:
    """The fields of a request that is right, but for its image perhaps."""
    image = address(picture(chance))
    few = {"max_tokens": chance.randrange(1, 6)}
    match route:
        case "/caption":
            return {"image": image, "prompt": "a", **few}
        case "/ask":
            return {"image": image, "question": "what?", **few}
        case "/match":
            return {"image": image, "texts": ["a dog", "a cat"]}
        case "/explain":
            return {"image": image}
        case "/v1/embeddings":
            return {"input": ["a dog", {"image": image}]}
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": image}}]
    said = [{"role": "assistant", "content": "a dog"}, {"role": "user", "content": "where?"}]
    return {"messages": [{"role": "user", "content": content}, *said], "stream": chance.random() < 0.3, **few}


def bounded(number: int, num_bytes: int) -> int:
    """So many of them, but not more than a body may hold and as much again, for this program's own memory."""
    return max(1, min(number, MOST_BYTES // max(num_bytes, 1)))


def mangled(chance: random.Random, tree: Any) -> Any:
    """One thing in it is another one."""
    if isinstance(tree, dict) and tree and chance.random() < 0.95:
        name = chance.choice(list(tree))
        match chance.randrange(6):
            case 0:
                return {each: tree[each] for each in tree if each != name}
            case 1:
                return {**tree, key(chance): value(chance)}
            case 2:
                return {**tree, name: value(chance)}
        return {**tree, name: mangled(chance, tree[name])}
    if isinstance(tree, list) and tree and chance.random() < 0.8:
        place = chance.randrange(len(tree))
        if chance.random() < 0.3:
            return tree * bounded(chance.choice([2, 40] if chance.random() > BIG else [30_000]), len(json.dumps(tree)))
        return [*tree[:place], mangled(chance, tree[place]), *tree[place + 1 :]]
    if isinstance(tree, str) and chance.random() < 0.6:
        raw = changed(chance, tree.encode("utf-8", "surrogatepass"))
        return raw.decode("utf-8", "surrogateescape")
    return value(chance)


def as_json(chance: random.Random, fields: Any) -> bytes:
    written = json.dumps(fields, ensure_ascii=chance.random() < 0.5)
    coding = chance.choice(["utf-8"] * 12 + ["utf-16", "utf-32", "utf-8-sig"])
    content = written.encode(coding, "surrogatepass")
    return changed(chance, content) if chance.random() < 0.2 else content


def as_form(chance: random.Random, fields: dict[str, Any]) -> bytes:
    parts = []
    for name, given in fields.items():
        for each in given if isinstance(given, list) else [given]:
            said = each if isinstance(each, str) else json.dumps(each)
            parts.append((name.encode("utf-8", "replace"), said.encode("utf-8", "replace"), False))
    if chance.random() < 0.8:
        parts = [part for part in parts if part[0] != b"image"] + [(b"image", picture(chance), True)]
    parts *= bounded(300 if chance.random() < BIG else 1, sum(len(said) for _, said, _ in parts))
    return form(*parts)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    kind: str
    body: bytes


def request(seed: int, place: int) -> Request:
    chance = random.Random(f"{seed} {place}")
    route = chance.choice(ROUTES)
    fields: Any = sound(chance, route)
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        fields = mangled(chance, fields)
    if chance.random() < 2 * BIG and isinstance(fields, dict):
        fields = {**fields, key(chance): large(chance)}
    kind = JSON
    match chance.randrange(10):
        case 0 | 1 if isinstance(fields, dict):
            kind, body = FORM, as_form(chance, fields)
            body = changed(chance, body) if chance.random() < 0.5 else body
        case 2 if isinstance(fields, dict):
            told = {name: each if isinstance(each, str) else json.dumps(each) for name, each in fields.items()}
            kind, body = ENCODED, urlencode(told, errors="replace").encode()
            body = changed(chance, body) if chance.random() < 0.5 else body
        case 3:
            body = as_json(chance, value(chance))
        case _:
            body = as_json(chance, fields)
    if chance.random() < 0.05:
        kind = chance.choice(KINDS)
    method = "POST" if chance.random() < 0.98 else chance.choice(["PUT", "GET", "HEAD", "OPTIONS", "DELETE", "PATCH"])
    return Request(method, route, kind, body[: MOST_BYTES // 2])


# ---- sending ----


@dataclass
class Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def send(port: int, one: Request) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=150)
    try:
        connection.request(one.method, one.path, one.body, {"Content-Type": one.kind})
        response = connection.getresponse()
        return response.status, response.read()
    except BrokenPipeError:  # it was answered before all was sent
        return 0, b""
    finally:
        connection.close()


def problem_of(status: int, content: bytes) -> str | None:
    """What is wrong with an answer: any fault of the server's, and a refusal that does not tell its reason."""
    if status >= 500 and status != 503:
        return f"{status} {content[:300]!r}"
    if status < 400 or not content:
        return None
    try:
        error = json.loads(content)["error"]
        return None if set(error) == {"message", "type", "param", "code"} and error["message"] else repr(error)
    except (ValueError, KeyError, TypeError):
        return f"{status} {content[:300]!r}"


def run(port: int, seed: int, places: range) -> Tally:
    tally, left, lock = Tally(), iter(places), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                place = next(left, None)
            if place is None:
                return
            try:
                status, content = send(port, request(seed, place))
                problem = problem_of(status, content)
            except (OSError, HTTPException) as error:
                status, problem = 0, f"{type(error).__name__} {error}"
            with lock:
                tally.statuses[str(status)] += 1
                if problem:
                    tally.problems.append(f"request {place}: {problem}")

    clients = [threading.Thread(target=work) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return tally


def main() -> None:
    os.nice(5)
    port, seed, first, last = map(int, sys.argv[1:])
    tally = run(port, seed, range(first, last))
    print(json.dumps({"statuses": tally.statuses, "problems": tally.problems}))


if __name__ == "__main__":
    main()
