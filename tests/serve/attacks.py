"""Ways to stop a server, each sent again and again by several clients.

As a program: ``python -m tests.serve.attacks NAME PORT SECONDS [HOST]``. It says "begun" once its requests are made,
attacks, prints how often it got which status (0: no answer), and is gone, with all of its connections.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.serve import bombs

JSON, FORM, ENCODED = "application/json", "multipart/form-data; boundary=xyz", "application/x-www-form-urlencoded"
CAPTION, ASK, MATCH, EXPLAIN = "/caption", "/ask", "/match", "/explain"
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
PATIENCE_S = 20.0
SLOW_HOST_PORT = 18_093
"""Where a server that allows it finds images that take long to come."""


# ---- to send ----


@dataclass(frozen=True)
class Target:
    port: int
    host: str = "127.0.0.1"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE_S)

    def post(self, path: str, body: bytes, kind: str = JSON, *, stays_s: float | None = None) -> int:
        """The status; 0 if there is none, or if it hangs up before: ``stays_s`` after all is sent."""
        return self.send(head(path, len(body), kind), body, stays_s=stays_s)

    def send(self, *pieces: bytes, stays_s: float | None = None, pause_s: float = 0) -> int:
        with suppress(OSError), self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            if stays_s is None:
                return status_of(connection)
            time.sleep(stays_s)
        return 0


def head(path: str, length: int | None, kind: str = JSON, *more: str) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", size, *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def status_of(connection: socket.socket) -> int:
    heard = b""
    while len(heard) < 12:
        if not (got := connection.recv(12 - len(heard))):
            return 0
        heard += got
    return int(heard[9:12])


def address(picture: bytes | None = None) -> str:
    return "data:image/png;base64," + base64.b64encode(picture or bombs.innocent()).decode()


def packed(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def chat(*messages: dict[str, Any], picture: str | None = None, text: str = "what is it?", **fields: Any) -> bytes:
    image = {"type": "image_url", "image_url": {"url": picture or address()}}
    last = {"role": "user", "content": [{"type": "text", "text": text}, image]}
    return packed({"messages": [*messages, last], **fields})


def form(*parts: tuple[bytes, bytes, bool]) -> bytes:
    """Of names, contents, and whether each is a file."""
    return b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="' + name + b'"' + b'; filename="f"' * is_file + b"\r\n\r\n"
        + content + b"\r\n"
        for name, content, is_file in parts
    ) + b"--xyz--\r\n"  # fmt: skip


def file(picture: bytes | None = None) -> bytes:
    return form((b"image", picture or bombs.innocent(), True))


# ---- attacks ----

Send = Callable[[Target], int]
"""One request; its status."""


@dataclass(frozen=True)
class Attack:
    make: Callable[[], Send]
    """Makes what is to be sent."""
    num_clients: int = 8


ATTACKS: dict[str, Attack] = {}


def attack(name: str, num_clients: int = 8) -> Callable[[Callable[[], Send]], Callable[[], Send]]:
    def noted(make: Callable[[], Send]) -> Callable[[], Send]:
        ATTACKS[name] = Attack(make, num_clients)
        return make

    return noted


def posts(path: str, body: bytes, kind: str = JSON, **how: Any) -> Send:
    return lambda target: target.post(path, body, kind, **how)


def simple(name: str, path: str, body: Callable[[], bytes], kind: str = JSON, num_clients: int = 8) -> None:
    ATTACKS[name] = Attack(lambda: posts(path, body(), kind), num_clients)


for _name, _make in bombs.PICTURE_BOMBS.items():
    simple(_name, CAPTION, lambda make=_make: file(make()), FORM)  # type: ignore[misc]


@attack("hung up: webp of 34 bytes, 32 of them")
def _() -> Send:
    shots = [{"image": base64.b64encode(bombs.webp_flat(shade)).decode()} for shade in range(1, 9)]
    return posts(EMBEDDINGS, packed({"input": shots * 4}), stays_s=0.3)


@attack("32 pictures of 29 million pixels")
def _() -> Send:
    picture = base64.b64encode(bombs.png(5380, 5380, bits=1)).decode()
    return posts(EMBEDDINGS, packed({"input": [{"image": picture}] * 32}))


@attack("hung up: jpeg of scans")
def _() -> Send:
    return posts(CAPTION, file(bombs.jpeg_of_scans()), FORM, stays_s=0.1)


@attack("conversations of three large pictures")
def _() -> Send:
    one = {"role": "user", "content": [{"type": "image_url", "image_url": address(bombs.jpeg_large())}]}
    said = {"role": "assistant", "content": "a dog"}
    return posts(CHAT, chat(one, said, one, said, picture=address(bombs.jpeg_large(True))))


# ---- base64 ----

simple("base64 of white space", CAPTION, lambda: packed({"image": "data:image/png;base64," + " \n" * 9_000_000}))
simple("base64 of escapes", CAPTION, lambda: packed({"image": "data:image/png;base64," + "%41" * 6_000_000}))
simple("base64 of escapes that are none", CAPTION, lambda: packed({"image": "data:;base64," + "%zz" * 6_000_000}))
simple("base64 of letters outside", CAPTION, lambda: packed({"image": "data:;base64," + "é" * 2_000_000}))
simple("base64 of commas", CAPTION, lambda: packed({"image": "data:" + "," * 18_000_000}))
simple("base64 of nothing", CAPTION, lambda: packed({"image": "data:;base64," + "=" * 18_000_000}))
simple("base64 in JSON escapes", CAPTION, lambda: b'{"image":"data:;base64,' + b"\\u0041" * 3_200_000 + b'"}')

# ---- JSON ----

simple("answers in a row", CHAT, lambda: packed({"messages": [
    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    *[{"role": "assistant", "content": "a " * 340}] * 1900, {"role": "user", "content": "hi"}]}))  # fmt: skip
simple("questions in a row", CHAT, lambda: packed({"messages": [{"role": "user", "content": "a " * 4000}] * 1900}))
simple("messages of nothing", CHAT, lambda: packed({"messages": [{"role": "assistant", "content": ""}] * 60_000}))
simple("parts of nothing", CHAT, lambda: packed({"messages": [{"role": "user", "content": [
    {"type": "text", "text": ""}] * 100_000}]}))  # fmt: skip
simple("many pictures", CHAT, lambda: packed({"messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": "x"}] * 100_000}]}))  # fmt: skip
simple("ignored fields", CHAT, lambda: b'{"x":[' + b",".join([b"[]"] * 4_800_000) + b"]}")
simple("ignored fields, as many as are read", CHAT,
       lambda: b'{"x":[' + b",".join([b"[]"] * 240_000) + b"]," + chat()[1:])
simple("tools of many values", CHAT, lambda: chat(tools=[[]] * 240_000))
simple("tools of a long text", CHAT, lambda: chat(tools="a" * 19_000_000))
simple("tools nested", CHAT, lambda: b'{"tools":' + b"[" * 900 + b"]" * 900 + b"," + chat()[1:])
simple("formats of many values", CHAT, lambda: chat(response_format={"type": "text", "x": [{}] * 240_000}))
simple("a long name of a model", CHAT, lambda: chat(model="m" * 19_000_000))
simple("a long name of a model, in marks", EMBEDDINGS, lambda: packed({"input": "a", "model": "\n" * 9_000_000}))
simple("deep lists", CAPTION, lambda: b"[" * 19_000_000)
simple("deep lists, as many as are read", CAPTION, lambda: b"[" * 490_000)
simple("deep objects", CHAT, lambda: b'{"a":' * 249_000 + b"1" + b"}" * 249_000)
simple("wide objects", CHAT, lambda: packed({f"key {each}": each for each in range(240_000)}))
simple("the same key", CHAT, lambda: b"{" + b",".join([b'"image":1'] * 240_000) + b"}")
simple("escapes", ASK, lambda: b'{"question":"' + b"\\ud83d\\ude00" * 1_500_000 + b'"}')
simple("halves of characters", ASK, lambda: b'{"question":"' + b"\\ud83d" * 3_000_000 + b'"}')
simple("a huge number", CHAT, lambda: b'{"seed":' + b"9" * 19_000_000 + b"}")
simple("many large numbers", CHAT, lambda: b'{"seed":[' + b",".join([b"9" * 4200] * 4400) + b"]}")
simple("a huge fraction", CHAT, lambda: b'{"temperature":0.' + b"1" * 19_000_000 + b"}")
simple("NaN", CHAT, lambda: b'{"x":[' + b",".join([b"NaN"] * 490_000) + b"]}")
simple("no UTF-8", CHAT, lambda: b'{"x":"' + b"\xff\xfe" * 9_000_000 + b'"}')
simple("UTF-32", CHAT, lambda: json.dumps({"x": "a" * 4_000_000}).encode("utf-32"))
simple("white space", CHAT, lambda: b" " * 19_000_000 + b"{}")
simple("an open string", CHAT, lambda: b'{"x":"' + b"a" * 19_000_000)
simple("stop lists", CHAT, lambda: chat(stop=["x"] * 240_000))
simple("inputs of a letter", EMBEDDINGS, lambda: packed({"input": ["a"] * 490_000}))
simple("inputs of numbers", EMBEDDINGS, lambda: packed({"input": [1] * 490_000}))
simple("inputs of the wrong kind", EMBEDDINGS, lambda: packed({"input": [{"image": 1}, *[{"x": []}] * 160_000]}))
simple("texts of Korean", MATCH, lambda: packed({"image": address(), "texts": ["\uac00" * 32_768] * 200}))
simple("texts of marks", MATCH, lambda: packed({"image": address(), "texts": ["\u0301" * 1024] * 256}))
simple("texts, as many as are read", MATCH, lambda: packed({"image": address(), "texts": ["\uac00 " * 500] * 256}))
simple("a long question", ASK, lambda: packed({"image": address(), "question": "가" * 32_000}))
simple("a long question of spaces", ASK, lambda: packed({"image": address(), "question": " " * 19_000_000}))
simple("conversations as long as are read", CHAT, lambda: chat(
    *[{"role": role, "content": "\u1100\u1161 e\u0301"} for role in ("user", "assistant")] * 900))  # fmt: skip

# ---- forms ----

simple("ampersands", ASK, lambda: b"&" * 19_000_000, ENCODED)
simple("fields", ASK, lambda: b"a=b&" * 4_500_000, ENCODED)
simple("percents", ASK, lambda: b"question=" + b"%F0" * 6_000_000, ENCODED)
simple("pluses", ASK, lambda: b"question=" + b"+" * 19_000_000, ENCODED)
simple("parts", ASK, lambda: form(*[(b"a", b"", False)] * 300_000), FORM)
simple("parts, as many as are read", ASK, lambda: form(*[(b"texts", b"a" * 45_000, False)] * 390), FORM)
simple("headers of a part", ASK, lambda: b"--xyz\r\n" + b"A: b\r\n" * 3_000_000, FORM)
simple("a long header of a part", ASK, lambda: b"--xyz\r\nA: " + b"b" * 19_000_000, FORM)
simple("a long disposition", ASK, lambda: b"--xyz\r\nContent-Disposition: form-data" + b";a=b" * 4_000_000
       + b"\r\n\r\n\r\n--xyz--\r\n", FORM)  # fmt: skip
simple("a quoted disposition", ASK, lambda: b'--xyz\r\nContent-Disposition: form-data; name="' + b"\\" * 18_000_000
       + b'"\r\n\r\n\r\n--xyz--\r\n', FORM)  # fmt: skip
simple("almost boundaries", ASK, lambda: b"--xyz\r\n\r\n" + b"\r\n--xy" * 3_000_000 + b"\r\n--xyz--\r\n", FORM)
simple("line ends", ASK, lambda: b"--xyz\r\n\r\n" + b"\r" * 19_000_000, FORM)
simple("line ends before", ASK, lambda: b"\r\n" * 9_000_000 + file(), FORM)
simple("after the end", ASK, lambda: file() + b"x" * 19_000_000, FORM)
simple("a form in a form", ASK, lambda: form((b"image", form((b"image", file() * 50, True)), True)), FORM)
simple("a form without end", ASK, lambda: file()[:-8], FORM)
simple("a form without boundary", ASK, file, "multipart/form-data")
simple("a boundary of all", ASK, file, "multipart/form-data; boundary=" + "x" * 60_000)
simple("a content type of parameters", ASK, file, "multipart/form-data" + ";a=b" * 15_000 + ";boundary=xyz")
simple("a content type of quotes", ASK, file, 'multipart/form-data; boundary="' + "\\" * 60_000)

# ---- connections ----


@attack("chunks of one byte", 16)
def _() -> Send:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in file()[:300_000])
    return lambda target: target.send(head(CAPTION, None, FORM), body, b"0\r\n\r\n")


@attack("extensions of chunks", 16)
def _() -> Send:
    body = (b"1;" + b"a" * 60_000 + b"\r\n \r\n") * 200
    return lambda target: target.send(head(CAPTION, None, FORM), body, b"0\r\n\r\n")


@attack("uploads byte by byte", 150)
def _() -> Send:
    return lambda target: target.send(head(CAPTION, 1000), *[b" "] * 1000, pause_s=0.2)


@attack("uploads that stop", 200)
def _() -> Send:
    return lambda target: target.send(head(CAPTION, 100), b"{", stays_s=30)


@attack("large uploads that stop", 100)
def _() -> Send:
    part = b" " * 19_000_000
    return lambda target: target.send(head(CAPTION, 19_500_000), part, stays_s=30)


@attack("heads byte by byte", 150)
def _() -> Send:
    return lambda target: target.send(*[b"%c" % byte for byte in head(CAPTION, 1000)], pause_s=0.1)


@attack("silent connections", 1100)
def _() -> Send:
    return lambda target: target.send(stays_s=30)


@attack("connections that come and go", 32)
def _() -> Send:
    return lambda target: target.send(stays_s=0)


@attack("answers that nobody reads", 64)
def _() -> Send:
    request = head(CAPTION, len(body := packed({"image": address()}))) + body

    def send(target: Target) -> int:
        with suppress(OSError), target.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            for _ in range(14):
                connection.sendall(request)
            time.sleep(30)
        return 0

    return send


@attack("pipelined", 16)
def _() -> Send:
    request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return lambda target: target.send(request * 2000, stays_s=1)


@attack("heads without end", 16)
def _() -> Send:
    return lambda target: target.send(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100_000)


@attack("no HTTP", 16)
def _() -> Send:
    return lambda target: target.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 2000)


@attack("another protocol", 16)
def _() -> Send:
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__"
    return lambda target: target.send(head(CAPTION, len(body := file()), FORM, upgrade) + body)


@attack("expected to continue", 64)
def _() -> Send:
    return lambda target: target.send(head(CAPTION, 1000, JSON, "Expect: 100-continue"), stays_s=30)


@attack("hang-ups at every stage", 16)
def _() -> Send:
    whole = head(CAPTION, len(body := file()), FORM) + body
    long = chat(stream=True, max_tokens=450, min_new_tokens=450)
    places = [10, 60, 200, len(whole) // 2, len(whole) - 1, len(whole)]
    turns = iter(range(10**9))

    def send(target: Target) -> int:
        turn = next(turns)
        with suppress(OSError), target.connect() as connection:
            if turn % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if turn % 7 == 6:
                connection.sendall(head(CHAT, len(long)) + long)
                status_of(connection)
            else:
                connection.sendall(whole[: places[turn % 7]])
            time.sleep((turn % 5) / 50)
        return 0

    return send


@attack("names of hosts", 8)
def _() -> Send:
    body = packed({"image": address()})
    lines = f"POST {CAPTION} HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\nContent-Type: {JSON}\r\n"
    return lambda target: target.send(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)


# ---- what is allowed, and expensive (the miniature has room for 512 tokens) ----

simple("64 beams of 450 tokens", CHAT, lambda: chat(num_beams=64, max_tokens=450, min_new_tokens=450), num_clients=4)
simple("64 answers with 20 alternatives", CHAT, lambda: chat(
    n=64, temperature=1, logprobs=True, top_logprobs=20, max_tokens=74, min_new_tokens=74),
       num_clients=4)  # fmt: skip
simple("64 answers in a stream", CHAT, lambda: chat(
    n=64, temperature=1, stream=True, max_tokens=450, min_new_tokens=450), num_clients=4)  # fmt: skip
simple("stop words", CHAT, lambda: chat(n=32, temperature=1, stop=["\uac00" * 100] * 16, max_tokens=512), num_clients=4)
simple("256 texts to match", MATCH, lambda: packed({"image": address(), "texts": ["a dog " * 9] * 256}), num_clients=4)
simple("256 texts to embed", EMBEDDINGS, lambda: packed({"input": ["a dog " * 9] * 256}), num_clients=4)
simple("32 pictures to embed", EMBEDDINGS, lambda: packed({"input": [{"image": address()}] * 32}), num_clients=4)
simple("explanations", EXPLAIN, lambda: packed({"image": address(), "caption": "a dog and " * 150}), num_clients=4)
simple("explanations of long texts", EXPLAIN, lambda: packed({"image": address(), "text": "dog " * 60}), num_clients=4)
simple("long questions", ASK, lambda: packed({"image": address(), "question": "what is it? " * 115, "num_beams": 16}),
       num_clients=8)  # fmt: skip


@attack("pictures of a slow host", 12)
def _() -> Send:
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            with suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

        def log_message(self, *_: object) -> None:
            pass

    with suppress(OSError):  # another attacker has it already
        host = ThreadingHTTPServer(("127.0.0.1", SLOW_HOST_PORT), Slow)
        host.daemon_threads = True
        threading.Thread(target=host.serve_forever, daemon=True).start()
    images = [{"image": f"http://localhost:{SLOW_HOST_PORT}/{each}.png"} for each in range(32)]
    return posts(EMBEDDINGS, packed({"input": images}))


# ---- as a program ----


def run(name: str, target: Target, seconds: float) -> Counter[int]:
    """How often it got which status. What is under way at the end is left."""
    chosen = ATTACKS[name]
    send = chosen.make()
    print("begun", flush=True)
    end_s = time.monotonic() + seconds
    found: Counter[int] = Counter()

    def work() -> None:
        while time.monotonic() < end_s:
            status = 0
            with suppress(OSError, ValueError):
                status = send(target)
            found[status] += 1
            if not status:
                time.sleep(0.01)

    threading.stack_size(2**18)
    workers = [threading.Thread(target=work, daemon=True) for _ in range(chosen.num_clients)]
    for worker in workers:
        worker.start()
    time.sleep(max(end_s - time.monotonic(), 0))
    return found.copy()


def main() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, most), most))
    os.nice(5)  # attackers have machines of their own
    name, port, seconds, *host = sys.argv[1:]
    found = run(name, Target(int(port), *host), float(seconds))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
