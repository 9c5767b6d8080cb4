"""Pictures from web addresses: none from inside a network, by whatever way it is asked for."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blip2.errors import ImageError
from blip2.serve.errors import ApiError
from blip2.serve.fetch import MAX_LOOKUPS, Fetcher, is_public, resolve
from tests.serve.conftest import PICTURES, eventually, serving

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"]
PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1",
    "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::7f00:1",
    "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::127.0.0.1", "fec0::1", "",
    "nonsense",
]  # fmt: skip


def never(*arguments, **options):
    raise AssertionError(f"{arguments} must not be reached")


def test_which_addresses_are_public() -> None:
    assert [address for address in PUBLIC if not is_public(address)] == []
    assert [address for address in PRIVATE if is_public(address)] == []


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("others", [[], ["8.8.8.8"]])
def test_a_name_that_leads_inside_is_refused(address, others, monkeypatch) -> None:
    """Also if only one of its addresses does, in whichever place."""
    monkeypatch.setattr("socket.create_connection", never)
    for answer in ([address, *others], [*others, address]):
        fetcher = Fetcher(domains=("*",), resolve=lambda host, port, answer=answer: answer)
        with pytest.raises(ApiError) as refused:
            fetcher.fetch("http://innocent.example/cat.png")
        assert (refused.value.status, refused.value.code) == (400, "image_address_refused")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/",
        "http://0177.0.0.1/", "http://017700000001/", "http://[::1]/", "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/", "http://169.254.169.254/latest/meta-data/", "http://localhost/", "http://0/",
        "http://localhost./", "http://LOCALHOST/", "https://10.0.0.1/", "http://[fe80::1%25lo]/", "http://[::]/",
    ],
)  # fmt: skip
def test_ways_to_write_this_machine_are_refused(url, monkeypatch) -> None:
    """With the resolver of this system, which knows octal, decimal and hexadecimal numbers."""
    monkeypatch.setattr("socket.create_connection", never)
    with pytest.raises((ApiError, ImageError)) as refused:
        Fetcher(domains=("*",)).fetch(url)
    if isinstance(refused.value, ImageError):  # the resolver did not take it for an address
        assert "there is no such host" in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.org/a.png", "gopher://example.org/", "http://example.org:22/",
        "https://example.org:8443/", "http://user@example.org/", "http://example.org:pass@evil.example/",
        "http://evil.example/", "http://evil.example#@example.org/", "http://evil.example\\@example.org/",
        "http://example.org.evil.example/", "http://notexample.org/", "http:///a.png", "http://example.org:99999/",
        "http://exa mple.org/", "http://example.org/\r\nHost: evil", "http://sub.example.org/", "http://[example.org/",
        "http://ｅxample.org/", "HTTP:example.org",
    ],
)  # fmt: skip
def test_only_what_was_allowed_is_resolved_at_all(url) -> None:
    with pytest.raises(ApiError) as refused:
        Fetcher(domains=("example.org",), resolve=never).fetch(url)
    assert refused.value.code == "image_address_refused"


def test_a_dot_before_a_domain_means_those_below_it() -> None:
    asked = []

    def note(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"]

    fetcher = Fetcher(domains=(".example.org",), resolve=note)
    for url in ("http://a.example.org/", "https://a.b.EXAMPLE.org./x", "http://example.org/", "http://aexample.org/"):
        with pytest.raises(ApiError):
            fetcher.fetch(url)
    assert asked == [("a.example.org", 80), ("a.b.example.org", 443)]


class Handler(BaseHTTPRequestHandler):
    heard: list[str] = []
    sent: list[tuple[str, bool]] = []  # what was asked for, and whether it was taken to its end

    def do_GET(self) -> None:
        Handler.heard.append(self.headers["Host"])
        name, _, rest = self.path.removeprefix("/").partition("/")
        if name == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        content = b"x" * 5000 if name in ("large", "slow") else PICTURES[0].read_bytes()
        self.send_response(404 if name == "missing" else 200)
        self.end_headers()
        for start in range(0, len(content), 500):
            try:
                self.wfile.write(content[start : start + 500])
            except OSError:
                Handler.sent.append((name, False))
                return
            if name == "slow":
                time.sleep(0.1)
        Handler.sent.append((name, True))

    def log_message(self, *arguments) -> None: ...


@pytest.fixture(scope="module")
def host() -> Iterator[int]:
    """A web server on this machine, and its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def fetcher(host: int, **options) -> Fetcher:
    """This machine plays pictures.example; every other address is looked at as always."""
    names = {"pictures.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]}
    return Fetcher(
        domains=(".example", "10.0.0.1", "localhost"),
        ports=(host, 80),
        resolve=lambda name, port: names.get(name) or resolve(name, port),
        is_allowed=lambda address: address == "127.0.0.1" or is_public(address),
        **options,
    )


def test_a_picture_comes_from_the_address_that_was_looked_at(host) -> None:
    Handler.heard.clear()
    found = fetcher(host).fetch(f"http://pictures.example:{host}/cat.png?size=1")
    assert found == PICTURES[0].read_bytes()
    assert Handler.heard == [f"pictures.example:{host}"]  # by its name, though the name leads nowhere


def test_redirects_are_looked_at_like_addresses(host) -> None:
    base = f"http://pictures.example:{host}"
    assert fetcher(host).fetch(f"{base}/to/{base}/cat.png") == PICTURES[0].read_bytes()
    assert fetcher(host).fetch(f"{base}/to//cat.png") == PICTURES[0].read_bytes()
    for target in ("http://10.0.0.1/", "http://inside.example/", "file:///etc/passwd", "http://other.org/",
                   "http://pictures.example:22/", "//10.0.0.1/"):  # fmt: skip
        with pytest.raises(ApiError) as refused:
            fetcher(host).fetch(f"{base}/to/{target}")
        assert refused.value.code == "image_address_refused"
    for times, is_fetched in ((5, True), (6, False)):
        url = f"{base}/" + "to//" * times + "cat.png"
        if is_fetched:
            assert fetcher(host).fetch(url)
        else:
            with pytest.raises(ImageError, match="more than 5 redirects"):
                fetcher(host).fetch(url)


def test_bytes_and_seconds_are_bounded(host) -> None:
    base = f"http://pictures.example:{host}"
    with pytest.raises(ApiError) as large:
        fetcher(host, max_bytes=4999).fetch(f"{base}/large")
    assert (large.value.status, large.value.code) == (413, "image_too_large")
    began_s = time.monotonic()
    with pytest.raises(ImageError, match="took too long"):
        fetcher(host, timeout_s=0.3).fetch(f"{base}/slow")
    assert time.monotonic() - began_s < 2
    with pytest.raises(ImageError, match="answered 404"):
        fetcher(host).fetch(f"{base}/missing")


def test_a_read_that_fails_after_the_time_limit_took_too_long(host, monkeypatch) -> None:
    """Whatever the operating system calls a connection that was aborted."""

    def reset(connection) -> None:
        time.sleep(0.2)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("http.client.HTTPConnection.getresponse", reset)
    url = f"http://pictures.example:{host}/cat.png"
    with pytest.raises(ImageError, match="took too long"):
        fetcher(host, timeout_s=0.1).fetch(url)
    with pytest.raises(ImageError, match="reset by peer"):
        fetcher(host).fetch(url)


def test_a_name_server_that_does_not_answer_is_given_up(host, monkeypatch) -> None:
    monkeypatch.setattr("socket.create_connection", never)
    answers, asked = threading.Event(), []

    def stuck(name: str, port: int) -> list[str]:
        asked.append(name)
        answers.wait(60)
        return ["127.0.0.1"]

    slow = Fetcher(domains=("*",), timeout_s=0.02, resolve=stuck)
    for _ in range(MAX_LOOKUPS):
        with pytest.raises(ImageError, match="took too long"):
            slow.fetch("http://slow.example/cat.png")
    # Its threads cannot be stopped, so there is an end to them.
    with pytest.raises(ImageError, match="too many name lookups"):
        slow.fetch("http://slow.example/cat.png")
    assert len(asked) == MAX_LOOKUPS
    answers.set()
    eventually(lambda: slow.lookups._value == MAX_LOOKUPS)
    with pytest.raises(ApiError, match="not on the public internet"):
        dataclasses.replace(slow, timeout_s=5).fetch("http://slow.example/cat.png")


# ---- TLS ----

TLS = Path(__file__).parent / "tls"
"""An authority of our own and what it signed, until 2126:

    openssl ecparam -name prime256v1 -genkey -noout -out authority.key
    openssl req -x509 -new -key authority.key -days 36500 -subj "/CN=Test authority of blip2" \\
        -addext keyUsage=critical,keyCertSign -out authority.pem

and for each NAME, "pictures" and "other":

    openssl ecparam -name prime256v1 -genkey -noout -out NAME.key
    openssl req -new -key NAME.key -subj "/CN=NAME.example" -out NAME.csr
    printf "subjectAltName=DNS:NAME.example\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n" >NAME.ext
    openssl x509 -req -in NAME.csr -CA authority.pem -CAkey authority.key -days 36500 -extfile NAME.ext -out NAME.crt
    cat NAME.key NAME.crt >NAME.pem
"""


@pytest.fixture
def secure(monkeypatch) -> Iterator[Callable[[str], tuple[int, list[str | None]]]]:
    """Starts a web server with a certificate; gives its port, and the names that it will be called by (SNI)."""
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
    servers = []

    def start(certificate: str) -> tuple[int, list[str | None]]:
        called: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS / f"{certificate}.pem")
        context.sni_callback = lambda connection, name, context: called.append(name)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda request, address: None  # type: ignore[method-assign]  # clients leave early here
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.server_port, called

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_secure_host_is_known_by_its_name_though_it_is_called_by_its_address(secure) -> None:
    port, called = secure("pictures")
    Handler.heard.clear()
    found = fetcher(port).fetch(f"https://pictures.example:{port}/cat.png")
    assert found == PICTURES[0].read_bytes()
    assert called == ["pictures.example"] and Handler.heard == [f"pictures.example:{port}"]


def test_a_host_that_cannot_prove_its_name_is_not_listened_to(secure) -> None:
    port, called = secure("other")
    Handler.heard.clear()
    with pytest.raises(ImageError, match=r"certificate for pictures\.example is not valid \(Hostname mismatch"):
        fetcher(port).fetch(f"https://pictures.example:{port}/cat.png")
    assert called == ["pictures.example"] and Handler.heard == []


def test_a_host_that_nobody_vouches_for_is_not_listened_to(secure, monkeypatch) -> None:
    port, _ = secure("pictures")
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "other.pem"))
    Handler.heard.clear()
    with pytest.raises(ImageError, match=r"certificate for pictures\.example is not valid \(.*local issuer"):
        fetcher(port).fetch(f"https://pictures.example:{port}/cat.png")
    assert Handler.heard == []


def test_the_seconds_of_a_secure_host_are_bounded(secure, host) -> None:
    port, _ = secure("pictures")
    Handler.sent.clear()
    with pytest.raises(ImageError, match="took too long"):  # each byte is in time
        fetcher(port, timeout_s=0.5).fetch(f"https://pictures.example:{port}/slow")
    eventually(lambda: Handler.sent)
    assert Handler.sent == [("slow", False)]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never says hello
        silent_port = silent.getsockname()[1]
        with pytest.raises(ImageError, match="download failed"):
            fetcher(silent_port, timeout_s=0.3).fetch(f"https://pictures.example:{silent_port}/")


def test_a_server_that_is_allowed_to_fetches(host, models) -> None:
    with serving(lambda: models, fetcher=fetcher(host)) as server:
        asked = {"image": f"http://pictures.example:{host}/cat.png"}
        assert server.http.post("/caption", json=asked).json()["text"] == models.pipeline.caption(PICTURES[0])
        inside = server.http.post("/caption", json={"image": "http://inside.example/cat.png"})
        assert (inside.status_code, inside.json()["error"]["code"]) == (400, "image_address_refused")
