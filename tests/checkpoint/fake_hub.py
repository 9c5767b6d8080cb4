"""As much of the Hugging Face hub as a download needs, on this machine: a tree, HEAD, GET with ranges, and mishaps."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "somebody/blip2-tiny"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """``files`` of one repository at one commit; what was asked for is noted in ``asked``."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    refusal: tuple[int, str] | None = None  # status and X-Error-Code, for everything
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    claimed_checksums: dict[str, str] = field(default_factory=dict)
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes of each answer before the line breaks
    stall_after_cuts: bool = False  # in place of the last break, the line stays open and silent
    asked: list[tuple[str, str]] = field(default_factory=list)  # file and range
    port: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def checksum(self, file: str) -> str:
        """As for a large file: of the content."""
        return self.claimed_checksums.get(file, hashlib.sha256(self.files[file]).hexdigest())

    def size(self, file: str) -> int:
        return self.claimed_sizes.get(file, len(self.files[file]))


@contextmanager
def serving(folder: Path, **more: object) -> Iterator[FakeHub]:
    """The files of a folder, and a pickled twin of its weights, as the repository `NAME`."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub = FakeHub(files | {"pytorch_model.bin": b"pickle", "flax_model.msgpack": b"flax", "README.md": b"#"}, **more)

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.done.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        if self.fake.refusal is not None:
            return self.refuse(*self.fake.refusal)
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{NAME}/revision/"):
            if path.rpartition("/")[2] not in self.fake.revisions:
                return self.refuse(404, "RevisionNotFound")
            return self.send_json({"id": NAME, "sha": COMMIT, "siblings": []})
        if path.startswith(f"/api/models/{NAME}/tree/"):
            if path.rpartition("/")[2] not in self.fake.revisions:
                return self.refuse(404, "RevisionNotFound")
            return self.send_json([self.entry(file) for file in self.fake.files])
        if not path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            return self.refuse(404, "RepoNotFound")
        file = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/").replace("%2F", "/")
        if file not in self.fake.files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(file, has_body=has_body)

    def entry(self, file: str) -> dict[str, object]:
        size, checksum = self.fake.size(file), self.fake.checksum(file)
        large = {"lfs": {"oid": checksum, "size": size, "pointerSize": 100}} if file.endswith(".safetensors") else {}
        return {"type": "file", "path": file, "size": size, "oid": checksum[:40], **large}

    def send_file(self, file: str, *, has_body: bool) -> None:
        content = self.fake.files[file]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        is_large = file.endswith(".safetensors")
        self.send_header("ETag", f'"{self.fake.checksum(file) if is_large else self.fake.checksum(file)[:40]}"')
        self.send_header("X-Linked-Size", str(self.fake.size(file)))
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not has_body:
            return
        self.fake.asked.append((file, self.headers.get("Range", "")))
        cuts = self.fake.cut_after.get(file, [])
        if not cuts:
            self.wfile.write(content[start:])
            return
        self.wfile.write(content[start : start + cuts.pop(0)])
        self.wfile.flush()
        if self.fake.stall_after_cuts and not cuts:
            self.fake.done.wait(60)
        self.close_connection = True

    def send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
