"""Names, other sites' pages, HEAD and OPTIONS, a proxy's prefix: all that is decided by headers alone."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.errors import OptionError
from blip2.serve.app import create_app
from blip2.serve.gate import Gate
from blip2.serve.hosts import ANY, NETWORK, Door, Hosts, default_hosts
from blip2.serve.routes import Routes
from tests.serve.conftest import PICTURES, serving

LOOPBACK = Door(allow_hosts=default_hosts("127.0.0.1", False))
ORIGIN = "http://localhost:3000"


@functools.cache
def application(door: Door, keys: tuple[str, ...]) -> Any:
    return create_app(lambda: None, door=door, keys=keys)  # type: ignore[arg-type, return-value]


def asked(door: Door, method: str, path: str, keys: tuple[str, ...] = (), **headers: str | None) -> httpx.Response:
    """An answer of a server that has no model yet: who is let in with a POST hears 503."""
    app = application(door, keys)
    given = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as client:
            return await client.request(method, path, headers=given)

    return asyncio.run(ask())


def refusal(door: Door, *hosts: bytes, has_keys: bool = False, version: str = "1.1") -> str | None:
    scope = {"method": "GET", "http_version": version, "headers": [(b"host", host) for host in hosts]}
    found = Hosts(door, has_keys=has_keys).refusal(scope)
    return None if found is None else found.code


# ---- names ----


@pytest.mark.parametrize(
    "host",
    [b"localhost", b"LocalHost:8000", b"localhost.", b"a.localhost:1", b"127.0.0.1:8000", b"127.9.9.9", b"127.1",
     b"[::1]", b"[::1]:8000", b"[fe80::1%eth0]:8000", b"192.168.1.7:8000", b"my-server:8000", b"blip2"],
)  # fmt: skip
def test_names_that_nobody_can_own_are_let_in(host) -> None:
    assert refusal(LOOPBACK, host) is None


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"evil.example:8000", b"EVIL.example.", b"localhost.evil.example", b"127.0.0.1.evil.example",
     b"127.0.0.1.nip.io", b"notlocalhost.example", b"box.lan", b"1.2.3.4.5"],
)  # fmt: skip
def test_names_that_somebody_can_own_are_not(host) -> None:
    assert refusal(LOOPBACK, host) == "unknown_host"


@pytest.mark.parametrize(
    "host",
    [b"", b" ", b".", b"a..b", b"localhost..", b"user@localhost", b"localhost/", b"localhost:8000:1", b"localhost:x",
     b"localhost:99999", b"localhost,evil.example", b"[::1", b"[::1]x", b"evil.example%00.localhost", b"a b",
     "b\u00fccher.localhost".encode(), b"\xff", b"a" * 70000, b"http://localhost"],
)  # fmt: skip
def test_what_is_no_name(host) -> None:
    assert refusal(LOOPBACK, host) == "invalid_host"
    assert refusal(Door(), host) == "invalid_host"  # of any name, too


def test_one_host_and_no_other_header_says_it() -> None:
    assert refusal(LOOPBACK, b"localhost", b"localhost") == refusal(LOOPBACK) == "invalid_host"
    assert refusal(LOOPBACK, version="1.0") is None
    answer = asked(LOOPBACK, "GET", "/health", host="evil.example", x_forwarded_host="localhost")
    assert answer.status_code == 421
    error = answer.json()["error"]
    assert error["code"] == "unknown_host" and "--allow-host evil.example" in error["message"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/v1/models", "/metrics", "/page/page.js"):
        assert asked(LOOPBACK, "GET", path, host="evil.example").status_code == 421
    for method in ("POST", "OPTIONS", "HEAD", "DELETE"):
        assert asked(LOOPBACK, method, "/caption", host="evil.example").status_code == 421


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_as_a_host_are_decided(host) -> None:
    assert refusal(LOOPBACK, host) in (None, "unknown_host", "invalid_host")


def test_names_that_were_given() -> None:
    door = Door(allow_hosts=("Blip2.Example.org.", ".corp.example", "bücher.example"))
    for host in (
        b"blip2.example.org:8000",
        b"corp.example",
        b"a.b.corp.example",
        b"xn--bcher-kva.example",
        b"localhost",
    ):
        assert refusal(door, host) is None
    for host in (b"example.org", b"a.blip2.example.org", b"evilcorp.example", b"corp.example.evil.org"):
        assert refusal(door, host) == "unknown_host"
    assert refusal(Door(allow_hosts=("*",)), b"evil.example") is None


def test_the_default_depends_on_who_can_reach_it() -> None:
    assert default_hosts("127.0.0.1", False) == default_hosts("::1", True) == default_hosts("localhost", False) == ()
    assert default_hosts("0.0.0.0", True) == default_hosts(None, False) == (ANY,)
    network = Door(allow_hosts=default_hosts("0.0.0.0", False))
    assert set(NETWORK) < set(network.allow_hosts)
    for host in (b"box.lan:8000", b"box.local", b"host.docker.internal", b"blip2.default.svc.cluster.local", b"box"):
        assert refusal(network, host) is None
    assert refusal(network, b"evil.example") == "unknown_host"


@pytest.mark.parametrize(
    "wrong",
    [{"allow_hosts": ("http://a.org",)}, {"allow_hosts": ("a.org:80",)}, {"allow_hosts": ("",)},
     {"allow_hosts": ("*.a.org",)}, {"allow_hosts": (".",)}, {"cors_origins": ("a.org",)}, {"cors_origins": ("",)},
     {"cors_origins": ("https://a.org/path",)}, {"cors_origins": ("http://a.org, http://b.org",)},
     {"root_path": "blip2"}, {"root_path": "/a b"}, {"root_path": "//a"}, {"root_path": "/../a"},
     {"root_path": "/a?b"}],
)  # fmt: skip
def test_what_cannot_be_given(wrong) -> None:
    flag = f"--{next(iter(wrong)).rstrip('s').replace('_', '-')}"
    with pytest.raises(OptionError, match=flag):
        Door(**wrong)


# ---- other sites' pages ----


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 503),
        ({"origin": "http://localhost:8000"}, 503),
        ({"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}, 503),
        ({"origin": "https://shown.example", "sec_fetch_site": "same-origin"}, 503),  # a proxy that rewrites Host
        ({"sec_fetch_site": "none"}, 503),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://evil.example", "sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"origin": "http://localhost:3001", "sec_fetch_site": "same-site"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "null", "host": "null"}, 403),
        ({"origin": "http://localhost:8000.evil.example"}, 403),
        ({"origin": "http://evil.example", "x_forwarded_host": "evil.example"}, 403),
        ({"origin": ORIGIN, "sec_fetch_site": "same-site"}, 503),
    ],
)
def test_a_page_of_another_site_uses_no_server_without_keys(headers, status) -> None:
    door = Door(cors_origins=(ORIGIN,))
    for path in ("/caption", "/v1/chat/completions", "/nowhere"):
        answer = asked(door, "POST", path, content_type="multipart/form-data; boundary=x", **headers)
        assert answer.status_code == status
    if status == 403:
        assert "--cors-origin" in answer.json()["error"]["message"]
        # With keys it is the key that decides, and no page of another site has one.
        assert asked(door, "POST", "/caption", ("secret",), **headers).status_code == 401
        assert asked(door, "POST", "/caption", ("secret",), authorization="Bearer secret", **headers).status_code == 503
    assert asked(door, "GET", "/health", **headers).status_code == 200


def test_a_page_that_is_allowed_may_read_every_answer() -> None:
    door = Door(cors_origins=(f"{ORIGIN.upper()}/", "https://a.example:443"))
    wanted = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    for path in ("/v1/chat/completions", "/caption", "/health", "/nowhere"):
        answer = asked(
            door, "OPTIONS", path, ("secret",), origin=ORIGIN, access_control_request_method="POST",
            access_control_request_headers=wanted, access_control_request_private_network="true",
        )  # fmt: skip
        assert answer.status_code == 204 and not answer.content
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == wanted
        assert answer.headers["access-control-allow-private-network"] == "true"
    for path, status in (("/health", 200), ("/v1/models", 401), ("/nowhere", 401)):
        answer = asked(door, "GET", path, ("secret",), origin=ORIGIN)
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["vary"] == "Origin"
        assert answer.headers.get_list("cross-origin-resource-policy") == ["cross-origin"]
    assert asked(door, "POST", "/caption", origin=ORIGIN).headers["access-control-allow-origin"] == ORIGIN
    assert asked(door, "GET", "/health", origin="https://a.example").headers["access-control-allow-origin"]
    for origin in ("http://localhost:3001", "https://localhost:3000", "http://evil.example", "null", None):
        for method in ("GET", "OPTIONS"):
            answer = asked(door, method, "/health", origin=origin, access_control_request_method="POST")
            assert answer.status_code in (200, 204) and answer.headers["vary"] == "Origin"
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    everybody = Door(cors_origins=("*",))
    assert asked(everybody, "POST", "/caption", origin="null").headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in asked(Door(), "GET", "/health", origin=ORIGIN).headers


# ---- methods and a prefix ----


def test_head_and_options_are_answered_on_every_route() -> None:
    routes = application(Door(), ()).openapi()["paths"]
    for path, methods in {**routes, "/": ["get"], "/page/page.js": ["get"]}.items():
        path = path.replace("{name}", "blip2")
        answer = asked(Door(), "OPTIONS", path, ("secret",))
        expected = {"OPTIONS", *map(str.upper, methods)} | ({"HEAD"} if "get" in methods else set())
        assert answer.status_code == 204 and set(answer.headers["allow"].split(", ")) == expected
        plain, head = (asked(Door(), method, path) for method in ("GET", "HEAD"))
        assert head.status_code == plain.status_code == (405 if "post" in methods else plain.status_code)
        assert not head.content and (path == "/metrics" or head.headers["content-length"] == str(len(plain.content)))
    assert asked(Door(), "OPTIONS", "/nowhere").status_code == 404
    assert asked(Door(), "HEAD", "/v1/models", ("secret",)).status_code == 401
    assert asked(Door(), "HEAD", "/page/page.js", ("secret",)).status_code == 200


def test_a_prefix_may_be_taken_off_by_the_proxy_or_not() -> None:
    door = Door(root_path="/tools/blip2/")
    for path in ("/health", "/tools/blip2/health"):
        assert asked(door, "GET", path).json() == {"status": "ok"}
        assert asked(door, "HEAD", path).status_code == 200
    assert asked(door, "GET", "/tools/blip2/").text == asked(Door(), "GET", "/").text
    slash = asked(door, "GET", "/tools/blip2")
    assert slash.status_code == 308 and slash.headers["location"] == "/tools/blip2/"
    for path in ("/tools/blip2health", "/tools/health", "/tools/blip2/tools/blip2/health"):
        assert asked(door, "GET", path).status_code == 404
    for path in ("/openapi.json", "/tools/blip2/openapi.json"):
        assert asked(door, "GET", path).json()["servers"] == [{"url": "/tools/blip2"}]
    # The key is asked for behind the prefix as before it.
    assert asked(door, "GET", "/tools/blip2/v1/models", ("secret",)).status_code == 401
    assert asked(door, "GET", "/tools/blip2/", ("secret",)).status_code == 200


def test_a_stream_and_an_error_of_a_real_server_reach_an_allowed_page(models) -> None:
    with serving(lambda: models, door=Door(cors_origins=(ORIGIN,))) as server:
        server.http.headers["Origin"] = ORIGIN
        head = server.http.head("/v1/models")
        assert head.status_code == 200 and not head.content
        assert server.http.get("/health").json() == {"status": "ok"}  # the same connection: nothing was left on it
        with PICTURES[0].open("rb") as file:
            assert server.http.post("/caption", files={"image": file}).json()["text"] == "a boat and two dogs"
        for body, status in (({"messages": [{"role": "user", "content": "a"}], "stream": True}, 400), ({}, 400)):
            answer = server.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == status and answer.headers["access-control-allow-origin"] == ORIGIN
        refused = server.http.post("/caption", files={"image": b"x" * 9_000_000}, headers={"Origin": "http://evil.org"})
        assert refused.status_code == 403
        assert server.metric("blip2_requests_rejected_total", reason="cross_site") == 1


def test_at_a_unix_socket_the_proxy_says_who_asks() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(scope["client"])

    gate = Gate(app, door=Door(), routes=Routes({}), has_keys=False)
    for client, forwarded in (
        (None, b"6.6.6.6, 10.0.0.7"), (None, b"10.0.0.7, evil"), (None, b"2001:db8::1"), (("10.0.0.1", 5), b"6.6.6.6"),
    ):  # fmt: skip
        headers = [(b"host", b"any.example"), (b"x-forwarded-for", forwarded)]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": client}
        asyncio.run(gate(scope, None, None))  # type: ignore[arg-type]
    assert heard == [("10.0.0.7", 0), None, ("2001:db8::1", 0), ("10.0.0.1", 5)]
