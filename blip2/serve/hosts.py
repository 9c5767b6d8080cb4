"""Which requests are accepted: by host name (header Host), and by the site of the web page (Origin).

A page in a user's browser can reach servers that others cannot: on the same machine or network. Two attacks are blocked
here. DNS rebinding (a name made to resolve to 127.0.0.1) shows in the Host header, which has that name. A form, or a
fetch without preflight, shows in Sec-Fetch-Site or Origin.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from starlette.types import Scope

from blip2.errors import OptionError
from blip2.serve.errors import ApiError

ANY = "*"
LOCAL = ("localhost", ".localhost")
"""Names that browsers never look up. They are always accepted, as are addresses and names without a dot, such as
``my-server``: nobody can own one of these on the internet."""
NETWORK = (
    ".local", ".localdomain", ".internal", ".intranet", ".private", ".lan", ".home", ".home.arpa", ".corp", ".svc",
    ".cluster.local", ".test",
)  # fmt: skip
"""Suffixes that only local networks use; nobody outside can own such a name, either."""
HOST = re.compile(r"(\[[0-9a-f:.]+(?:%[\w.~-]+)?\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::(\d{0,5}))?", re.ASCII)
MAX_HOST = 300
"""Maximum length of a Host that is parsed; an internet name has at most 253 characters."""
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/@?#\\,]+", re.ASCII)
OWN_SITE = (b"same-origin", b"none")


@dataclass(frozen=True, kw_only=True)
class Door:
    """The access options of the server, as the command line takes them.

    Raises OptionError for an invalid origin, host name or path.
    """

    cors_origins: tuple[str, ...] = ()
    """Origins (``https://example.org``) whose pages may use the server from a browser; ``*`` is any."""
    allow_hosts: tuple[str, ...] = (ANY,)
    """Host names that are accepted besides `LOCAL`: ``example.org``, or ``.example.org`` for all subdomains. For the
    default see `default_hosts`."""
    root_path: str = ""
    """The path prefix under which a proxy publishes the server, such as ``/blip2``, whether the proxy removes it or
    not."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cors_origins", tuple(map(_origin, self.cors_origins)))
        object.__setattr__(self, "allow_hosts", tuple(map(_host, self.allow_hosts)))
        object.__setattr__(self, "root_path", _root_path(self.root_path))


def default_hosts(address: str | None, has_keys: bool) -> tuple[str, ...]:
    """The default of `Door.allow_hosts`. ``address``: the listening address; None is a Unix socket.

    Only this machine: no others. In a network: the suffixes of local networks, and with keys any name, since a page
    that uses DNS rebinding has no key. Behind a Unix socket: any, since the proxy checks names.
    """
    if address is None:
        return (ANY,)
    if is_loopback(address):
        return ()
    return (ANY,) if has_keys else (*NETWORK, socket.gethostname().lower())


def is_loopback(address: str) -> bool:
    """Whether a listening address or name is only reachable from this machine."""
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


class Hosts:
    """Checks a request by its headers alone."""

    def __init__(self, door: Door, *, has_keys: bool) -> None:
        names = (*LOCAL, *door.allow_hosts)
        self._any = ANY in names
        self._names = frozenset(name.removeprefix(".") for name in names if name != ".localhost")
        self._suffixes = tuple(name for name in names if name.startswith("."))
        self._origins = frozenset(door.cors_origins)
        self._has_keys = has_keys

    def allows_origin(self, origin: bytes) -> bool:
        """Whether pages of an origin may read answers."""
        return ANY in self._origins or (len(origin) <= MAX_HOST and _without_port(_text(origin)) in self._origins)

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is refused, or None: a malformed Host, an unknown name, or a page of another site."""
        given = [value for name, value in scope["headers"] if name == b"host"]
        if given or scope.get("http_version") != "1.0":  # health checks of old load balancers send no Host; browsers do
            if len(given) != 1 or (host := _parsed(given[0])) is None:
                return ApiError(400, "invalid_host", "send one header Host, with the name or address of this server")
            if not self._is_ours(host):
                return ApiError(
                    421, "unknown_host", f"this server does not accept the host name {host!r}; its operator can "
                    f"allow it with --allow-host {host}",
                )  # fmt: skip
        if self._has_keys or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None  # browsers hide answers from other pages, and pages have no key
        return self._foreign_origin(scope, given[0] if given else b"")

    def _is_ours(self, host: str) -> bool:
        return (
            self._any
            or host in self._names
            or "." not in host  # IPv6 addresses, too
            or host.endswith(self._suffixes)
            or is_address(host)
        )

    def _foreign_origin(self, scope: Scope, host: bytes) -> ApiError | None:
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        sites = [value for name, value in scope["headers"] if name == b"sec-fetch-site"]
        if len(origins) == 1 and self.allows_origin(origins[0]):
            return None
        if all(site in OWN_SITE for site in sites):
            if sites or not origins:  # set by the browser, pages cannot change it; or no browser
                return None
            if len(origins) == 1 and b"://" in origins[0] and _authority(origins[0]) == _authority(host):
                return None
        origin = _text(origins[0])[:100] if origins else ""
        of_origin, named = (f" ({origin})", origin) if ORIGIN.fullmatch(origin) else ("", "ORIGIN")
        return ApiError(
            403, "cross_site", f"a page of another site{of_origin} may not use this server; its operator can allow "
            f"it with --cors-origin {named}. If it is the server's own page, a reverse proxy has to pass on the header "
            "Host",
        )  # fmt: skip


def _parsed(value: bytes) -> str | None:
    """The name or address in a Host header, in lower case; None if it is neither."""
    found = HOST.fullmatch(_text(value)) if len(value) <= MAX_HOST else None
    if found is None or int(found[2] or 0) > 0xFFFF:
        return None
    return found[1].strip("[]").removesuffix(".")


def is_address(host: str) -> bool:
    """Whether a host is an IPv4 address as `inet_aton` reads it, or an IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return True
    try:
        socket.inet_aton(host)  # also accepts 127.1 and 0x7f000001, which are not names
    except OSError:
        return False
    return True


def _text(value: bytes) -> str:
    return value.decode("latin-1").strip(" \t").lower()


def _without_port(origin: str) -> str:
    """An origin as browsers write it, without the default port of its scheme."""
    for scheme, port in (("http://", ":80"), ("https://", ":443")):
        if origin.startswith(scheme):
            return origin.removesuffix(port)
    return origin


def _authority(value: bytes) -> str:
    """Host and port of an origin or a Host header. A proxy may use http to us and https to the browser, so both default
    ports are dropped."""
    return _text(value).rpartition("://")[2].removesuffix(":80").removesuffix(":443")


def _ascii(name: str) -> str:
    """A name in the form that browsers send."""
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return name


def _origin(given: str) -> str:
    text = given.strip().lower().removesuffix("/")
    scheme, colon, rest = text.partition("://")
    text = _without_port(f"{scheme}{colon}{_ascii(rest)}")
    if text not in (ANY, "null") and not ORIGIN.fullmatch(text):
        raise OptionError(
            f"--cors-origin is {given!r}; give a scheme and a host, such as https://example.org or "
            "http://localhost:3000, or * for any"
        )
    return text


def _host(given: str) -> str:
    if given == ANY:
        return given
    name = _ascii(given.strip().lower().removesuffix("."))
    found = HOST.fullmatch(name.removeprefix("."))
    if found is None or ":" in name.partition("]")[2] or (found[2] is not None and "]" not in name):
        raise OptionError(
            f"--allow-host is {given!r}; give only a name, such as blip2.example.org, or .example.org for all "
            "subdomains, or * for any"
        )
    return name.strip("[]")


def _root_path(given: str) -> str:
    path = given.rstrip("/")
    if path and not re.fullmatch(r"(/(?!\.{1,2}(/|$))[\w.~!$&'()*+,;=:@-]+)+", path, re.ASCII):
        raise OptionError(f"--root-path is {given!r}; give a path such as /blip2")
    return path
