"""Images from the web, for those who allow it: only from named hosts, and never from inside the network.

A name may be made to point anywhere, so it is resolved once, each of its addresses has to be a public one, and the
connection goes to an address that was looked at. A redirect is a new address, with all that this asks for.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from blip2.errors import ImageError
from blip2.serve.errors import ApiError

MAX_REDIRECTS = 5
MAX_LOOKUPS = 32
"""Names that are looked up at the same time, those included that nobody waits for any more."""
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
# What the standard library's tables take for public, in some versions: addresses with another one inside, which need
# not be public (NAT64, 6to4, Teredo), and those that are set aside for protocols and sites.
NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/23", "fec0::/10", "192.0.0.0/24", "192.88.99.0/24"),
    )
)

Resolve = Callable[[str, int], Sequence[str]]
"""All addresses of a host; raises OSError."""


def resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet; IPv4 inside IPv6 is looked at as IPv4."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a scope, "fe80::1%eth0"
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return is_public(str(parsed.ipv4_mapped))
    if any(parsed in network for network in NOT_PUBLIC):
        return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """Fetches from ``domains``: a name stands for itself, ".name" for all below it, "*" for any.

    ``ports``, ``resolve`` and ``is_allowed`` are for tests, which have no internet.
    """

    domains: tuple[str, ...] = ()
    max_bytes: int = 20 * 2**20
    timeout_s: float = 5.0
    ports: tuple[int, ...] = (80, 443)
    resolve: Resolve = resolve
    is_allowed: Callable[[str], bool] = is_public
    lookups: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(MAX_LOOKUPS), init=False, repr=False, compare=False
    )

    def fetch(self, url: str) -> bytes:
        """What is there. Raises ApiError for what is not allowed, ImageError for what does not come."""
        if not self.domains:
            raise ApiError(
                400, "remote_images_disabled",
                "images at web addresses are not fetched by this server; send the image itself, as a "
                "data:image/...;base64, address (or start the server with --allow-images-from)",
                param="image",
            )  # fmt: skip
        end_s = time.monotonic() + self.timeout_s
        for _ in range(1 + MAX_REDIRECTS):
            status, location, content = self._get(url, end_s)
            if status not in REDIRECTS:
                if status != 200:
                    raise ImageError(f"{_short(url)}: the server says {status}; check the address")
                return content
            if not location:
                raise ImageError(f"{_short(url)}: leads nowhere ({status} without an address)")
            url = urljoin(url, location)
        raise ImageError(f"more than {MAX_REDIRECTS} redirects; give the address where they end")

    def _get(self, url: str, end_s: float) -> tuple[int, str | None, bytes]:
        parts, host, port = self._checked(url)
        addresses = self._addresses(url, host, port, end_s)
        if not addresses or not all(self.is_allowed(address) for address in addresses):
            raise _refused(url, "its host is not on the public internet")
        connection = _Pinned(addresses[0], host, port, is_secure=parts.scheme == "https", end_s=end_s)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # A host that sends one byte now and then would outlast any timeout of the socket.
        alarm = threading.Timer(max(end_s - time.monotonic(), 0), connection.abort)
        alarm.start()
        try:
            connection.request("GET", path, headers={"User-Agent": "blip2", "Accept-Encoding": "identity"})
            response = connection.getresponse()
            content = bytearray()
            while response.status == 200 and (chunk := response.read1(2**16)):
                content += chunk
                if len(content) > self.max_bytes:
                    raise ApiError(413, "image_too_large", f"{_short(url)}: larger than {self.max_bytes:,} bytes")
            if time.monotonic() >= end_s:
                raise TimeoutError("it took too long")
            return response.status, response.getheader("Location"), bytes(content)
        except ssl.SSLCertVerificationError as error:
            raise ImageError(
                f"{_short(url)}: its host cannot prove to be {host} ({error.verify_message}); check the address"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{_short(url)}: cannot be fetched ({reason}); check the address") from None
        finally:
            alarm.cancel()
            connection.close()

    def _addresses(self, url: str, host: str, port: int, end_s: float) -> Sequence[str]:
        """All addresses of a host, in a thread of its own: a name server that does not answer is waited for no longer
        than a host, though the system's resolver cannot be stopped. So many are left behind at most."""
        if not self.lookups.acquire(blocking=False):
            raise ImageError(f"{_short(url)}: too many names are being looked up; try again later")
        found: Future[Sequence[str]] = Future()

        def look_up() -> None:
            try:
                found.set_result(self.resolve(host, port))
            except BaseException as error:  # handed to whoever waits
                found.set_exception(error)
            finally:
                self.lookups.release()

        threading.Thread(target=look_up, name="blip2 name", daemon=True).start()
        try:
            return found.result(max(end_s - time.monotonic(), 0))
        except TimeoutError:
            raise ImageError(f"{_short(url)}: to look up its host took too long; check the address") from None
        except (OSError, UnicodeError):
            raise ImageError(f"{_short(url)}: there is no host of that name; check the address") from None

    def _checked(self, url: str) -> tuple[SplitResult, str, int]:
        """Scheme, host and port, all of them allowed."""
        if not re.fullmatch(r"[!-\[\]-~]+", url):  # no white space, no backslash, nothing that parsers read differently
            raise _refused(url, "it has characters that addresses do not have")
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".")
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _refused(url, "it is no address") from None
        if parts.scheme not in PORTS or not host:
            raise _refused(url, "only http and https addresses are fetched")
        if parts.username is not None or parts.password is not None:
            raise _refused(url, "it has a user name in it")
        if port not in self.ports:
            raise _refused(url, f"port {port} is not one of {', '.join(map(str, self.ports))}")
        if not any(
            domain == "*" or (host.endswith(domain) if domain.startswith(".") else host == domain)
            for domain in map(str.lower, self.domains)
        ):
            raise _refused(url, "its host is not among those that this server fetches from")
        return parts, host, port


class _Pinned(http.client.HTTPConnection):
    """Speaks to one address, as if it had found it by the host's name; all of it until ``end_s`` (monotonic)."""

    def __init__(self, address: str, host: str, port: int, *, is_secure: bool, end_s: float) -> None:
        super().__init__(host, port)
        if is_secure:
            self.default_port = PORTS["https"]  # so that the Host header is without the port
        self._address = address
        self._raw: socket.socket | None = None
        self._is_secure = is_secure
        self._end_s = end_s

    def connect(self) -> None:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it took too long")
        self._raw = socket.create_connection((self._address, self.port), timeout=left_s)
        self.sock = self._raw
        if self._is_secure:
            # The plain socket is of no use once it is wrapped, so `abort` has to know the other before it is spoken to.
            self.sock = self._raw = ssl.create_default_context().wrap_socket(
                self._raw, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()

    def abort(self) -> None:
        """End whatever is being waited for, from another thread."""
        if self._raw is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._raw, socket.SHUT_RDWR)  # below TLS, which another thread is reading


def _refused(url: str, reason: str) -> ApiError:
    return ApiError(400, "image_address_refused", f"{_short(url)}: is not fetched: {reason}", param="image")


def _short(url: str) -> str:
    printable = url if url.isprintable() else repr(url)
    return printable if len(printable) <= 120 else f"{printable[:117]}..."
