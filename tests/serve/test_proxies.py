"""A real server behind the reverse proxies of docs/proxies: their files as they are, but for paths, names and ports."""

from __future__ import annotations

import datetime
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import PICTURES, data_url, eventually, user

ROOT = Path(__file__).parents[2]
PROXIES = ROOT / "docs/proxies"
KEY = "a-key-of-the-test"
KEYS = {"Authorization": f"Bearer {KEY}"}
HOST, BESIDE = "blip2.localhost", "www.localhost"
"""In place of the names of the files: one that has blip2 alone, and one that has it below a path."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def names_of_this_machine() -> Iterator[None]:
    """Not every resolver knows what is below localhost."""
    look_up = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket, "getaddrinfo",
            lambda host, *others, **more: look_up("127.0.0.1" if host in (HOST, BESIDE) else host, *others, **more),
        )  # fmt: skip
        yield


@dataclass
class Proxied:
    port: int
    authority: ssl.SSLContext
    uds: Path

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(HOST, self.port, context=self.authority, timeout=60)

    def client(self, host: str = HOST, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=f"https://{host}:{self.port}", verify=self.authority, timeout=60, **options)

    def metric(self, name: str) -> float:
        """Of the server itself, past the proxy."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.uds)), base_url="http://own", headers=KEYS) as own:
            lines = own.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Signed by itself, for the names of this test."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST), x509.DNSName(BESIDE)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "certificate.pem", folder / "key.pem"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def replaced(text: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        assert old in text
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, pairs: dict[str, str]) -> list[str]:
    text = replaced((PROXIES / "nginx.conf").read_text(), {**pairs, "listen 443 ssl": f"listen 127.0.0.1:{port} ssl"})
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds) + "access_log off;\n"
    (folder / "nginx.conf").write_text(text.replace("http {\n", f"http {{\n{paths}"))
    user = "user root; " if os.getuid() == 0 else ""  # its workers are nobody else, who may not open the socket
    options = f"{user}daemon off; pid {folder}/pid; error_log stderr warn;"
    return [found("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", options]


def caddy(folder: Path, port: int, pairs: dict[str, str]) -> list[str]:
    text = replaced((PROXIES / "Caddyfile").read_text(), pairs)
    own = f"{{\n\tadmin off\n\thttps_port {port}\n\tauto_https disable_redirects\n\tstorage file_system {folder}\n"
    (folder / "Caddyfile").write_text(text.replace("\n{\n", f"\n{own}", 1))
    return [found("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


def found(program: str) -> str:
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen]:
    with (folder / f"{Path(command[0]).name}.log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder), **environment}
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            log.seek(0)
            print(log.read())  # pytest shows it with a test that fails


@contextmanager
def proxied(kind: Any, uds: Path, folder: Path, certificate: tuple[Path, Path]) -> Iterator[Proxied]:
    port = free_port()
    pairs = {
        "/run/blip2/blip2.sock;" if kind is nginx else "/run/blip2/blip2.sock {":
            f"{uds}{';' if kind is nginx else ' {'}",
        "/etc/ssl/blip2/certificate.pem": str(certificate[0]),
        "/etc/ssl/blip2/key.pem": str(certificate[1]),
        "blip2.example.org": HOST,
        "www.example.org": BESIDE,
    }  # fmt: skip
    command = kind(folder, port, pairs)
    authority = ssl.create_default_context(cafile=str(certificate[0]))
    with running(command, folder) as process:
        proxy = Proxied(port, authority, uds)

        def is_open() -> bool:
            assert process.poll() is None
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(is_open)
        yield proxy


@pytest.fixture(scope="module")
def uds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real `blip2 serve`, as the proxies' files say it is started."""
    folder = tmp_path_factory.mktemp("server")
    path, keys = folder / "blip2.sock", folder / "keys.txt"
    keys.write_text(f"{KEY}\n")
    options = ["--uds", str(path), "--root-path", "/blip2", "--api-key-file", str(keys)]
    command = [sys.executable, "-m", "blip2", "serve", *options]
    with running(command, folder):
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://own") as own:
            eventually(path.exists, 60)
            eventually(lambda: own.get("/ready").status_code == 200, 60)
        yield path


@pytest.fixture(scope="module", params=[nginx, caddy], ids=lambda kind: kind.__name__)
def proxy(request, uds, certificate, tmp_path_factory) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    folder.chmod(0o755)
    with proxied(request.param, uds, folder, certificate) as started:
        yield started


def test_a_caption_comes_through_with_a_key_and_not_without(proxy, models) -> None:
    with proxy.client() as client, PICTURES[0].open("rb") as file:
        expected = models.pipeline.caption(PICTURES[0])
        assert client.post("/caption", files={"image": file}, headers=KEYS).json()["text"] == expected
        refused = client.post("/caption", json={"image": data_url(PICTURES[0])})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"


def test_a_stream_comes_event_by_event(proxy) -> None:
    """What is written first is there long before the last: the proxy holds nothing back."""
    body = {"messages": [user("", PICTURES[0])], "stream": True, "temperature": 1.5, "seed": 1, "max_tokens": 40,
            "min_new_tokens": 40}  # fmt: skip
    came_s = []
    with proxy.client() as client, client.stream("POST", "/v1/chat/completions", json=body, headers=KEYS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                came_s.append((time.monotonic(), line))
    assert came_s[-1][1] == "data: [DONE]" and len(came_s) > 20
    assert len({round(moment, 3) for moment, _ in came_s}) > 10


def test_the_page_lies_below_the_path(proxy) -> None:
    with proxy.client(BESIDE) as client:
        slash = client.get("/blip2")
        assert slash.status_code in (301, 308) and slash.headers["location"].endswith("/blip2/")
        page = client.get("/blip2/")
        assert page.status_code == 200 and "text/html" in page.headers["content-type"]
        script = client.get("/blip2/page/page.js")
        assert script.status_code == 200 and "javascript" in script.headers["content-type"]
        assert client.get("/blip2/openapi.json", headers=KEYS).json()["servers"] == [{"url": "/blip2"}]
        answer = client.post("/blip2/caption", json={"image": data_url(PICTURES[0])}, headers=KEYS)
        assert answer.status_code == 200
        assert client.get("/health").content != b'{"status":"ok"}' and client.get("/blip2x").status_code != 308
    with proxy.client() as client:  # a host of its own: with the prefix or without
        assert client.get("/").text == page.text
        assert client.get("/v1/models", headers=KEYS).json()["data"][0]["id"] == "miniature"


def test_a_large_body_comes_through_and_a_larger_one_is_told_so_by_the_server(proxy) -> None:
    with proxy.client(headers=KEYS) as client:
        # As many bytes as the server takes: nginx by itself takes one million.
        filled = PICTURES[0].read_bytes() + b"\0" * 14_000_000
        answer = client.post("/caption", json={"image": data_url(filled)})
        assert answer.status_code == 200, answer.text
        refused = client.post("/caption", files={"image": b"x" * (20 * 2**20 + 1000)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert client.post("/caption", files={"image": b"x" * (22 * 2**20)}).status_code == 413


def test_a_crowd_that_says_one_byte_each_shuts_nobody_out(proxy) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most[1], 4096), most[1]))
    with ExitStack() as crowd:
        crowd.callback(resource.setrlimit, resource.RLIMIT_NOFILE, most)
        for _ in range(1100):
            silent = crowd.enter_context(socket.create_connection(("127.0.0.1", proxy.port), timeout=10))
            silent.sendall(b"\x16")  # of a TLS greeting
        with proxy.client() as client:
            assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_hangs_up_frees_the_rows(proxy, is_stream) -> None:
    body = {"messages": [user("", PICTURES[0])], "max_tokens": 120, "min_new_tokens": 120, "stream": is_stream}
    body |= {"temperature": 1.5} if is_stream else {"num_beams": 64}
    finished = 'blip2_tokens_total{kind="completion"}'
    before = proxy.metric(finished)
    connection = proxy.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {**KEYS, "Content-Type": "application/json"})
    eventually(lambda: proxy.metric("blip2_rows") > 0)
    connection.sock.close()  # type: ignore[union-attr]
    eventually(lambda: proxy.metric("blip2_rows") == 0, 5)
    assert proxy.metric(finished) == before  # counted at its end, to which it did not come


def test_the_server_hears_the_name_and_the_address_that_the_client_has(certificate, tmp_path, request) -> None:
    """Host with its port, which the page's own POST is measured by, and no address that a client made up."""
    for kind in (nginx, caddy):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        path = folder / "own.sock"
        heard: list[bytes] = []

        def answer(listener: socket.socket, heard: list[bytes] = heard) -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(2**16))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            with proxied(kind, path, folder, certificate) as proxy, proxy.client() as client:
                thread = threading.Thread(target=answer, args=(listener,), daemon=True)
                thread.start()
                assert client.get("/x%2F..%2Fy?a=%20", headers={"X-Forwarded-For": "6.6.6.6"}).status_code == 200
                thread.join()
        head = heard[0].decode().lower()
        assert f"\r\nhost: {HOST}:{proxy.port}\r\n" in head
        assert "\r\nx-forwarded-for: 127.0.0.1\r\n" in head and "6.6.6.6" not in head
        assert head.startswith("get /x%2f..%2fy?a=%20 http/1.1\r\n")  # the path as it was written


def test_a_server_that_is_not_there_is_a_bad_gateway(certificate, tmp_path) -> None:
    for kind in (nginx, caddy):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        with proxied(kind, folder / "none.sock", folder, certificate) as proxy, proxy.client() as client:
            assert client.get("/health").status_code == 502
