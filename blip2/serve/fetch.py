"""Downloads of images, if enabled: only from named hosts, and never from private networks.

A name can resolve to any address, so it is resolved once, each of its addresses has to be public, and the connection
goes to a checked address. A redirect is checked like a new URL.
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
"""Maximum concurrent name lookups, including abandoned ones."""
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
# Addresses that some versions of the standard library take for public: those that contain another address, which may be
# private (NAT64, 6to4, Teredo), and those reserved for protocols and sites.
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
    """Whether an address is public; IPv4 inside IPv6 is checked as IPv4."""
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
    """Downloads from ``domains``: an exact name, ".name" for all subdomains, "*" for any.

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
        """The content at a URL. Raises ApiError if it is not allowed, ImageError if the download fails."""
        if not self.domains:
            raise ApiError(
                400, "remote_images_disabled",
                "this server does not download images from URLs; send the image itself as a "
                "data:image/...;base64, URL (or start the server with --allow-images-from)",
                param="image",
            )  # fmt: skip
        end_s = time.monotonic() + self.timeout_s
        for _ in range(1 + MAX_REDIRECTS):
            status, location, content = self._get(url, end_s)
            if status not in REDIRECTS:
                if status != 200:
                    raise ImageError(f"{_short(url)}: the host answered {status}; check the URL")
                return content
            if not location:
                raise ImageError(f"{_short(url)}: redirects without a target ({status})")
            url = urljoin(url, location)
        raise ImageError(f"more than {MAX_REDIRECTS} redirects; give the final URL")

    def _get(self, url: str, end_s: float) -> tuple[int, str | None, bytes]:
        parts, host, port = self._checked(url)
        addresses = self._addresses(url, host, port, end_s)
        if not addresses or not all(self.is_allowed(address) for address in addresses):
            raise _refused(url, "its host is not on the public internet")
        connection = _Pinned(addresses[0], host, port, is_secure=parts.scheme == "https", end_s=end_s)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # A host that sends a byte now and then would outlast any timeout of the socket.
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
                f"{_short(url)}: the certificate for {host} is not valid ({error.verify_message}); check the URL"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # After `abort`, a read can fail in several ways, a reset connection among them.
            is_late = time.monotonic() >= end_s
            reason = "it took too long" if is_late else " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{_short(url)}: download failed ({reason}); check the URL") from None
        finally:
            alarm.cancel()
            connection.close()

    def _addresses(self, url: str, host: str, port: int, end_s: float) -> Sequence[str]:
        """All addresses of a host, looked up in a separate thread with a timeout, since the system's resolver cannot be
        interrupted. The number of abandoned lookups is limited."""
        if not self.lookups.acquire(blocking=False):
            raise ImageError(f"{_short(url)}: too many name lookups are running; try again later")
        found: Future[Sequence[str]] = Future()

        def look_up() -> None:
            try:
                found.set_result(self.resolve(host, port))
            except BaseException as error:  # raised by the waiting thread
                found.set_exception(error)
            finally:
                self.lookups.release()

        threading.Thread(target=look_up, name="blip2 name", daemon=True).start()
        try:
            return found.result(max(end_s - time.monotonic(), 0))
        except TimeoutError:
            raise ImageError(f"{_short(url)}: looking up the host took too long; check the URL") from None
        except (OSError, UnicodeError):
            raise ImageError(f"{_short(url)}: there is no such host; check the URL") from None

    def _checked(self, url: str) -> tuple[SplitResult, str, int]:
        """Scheme, host and port, all of them allowed."""
        if not re.fullmatch(r"[!-\[\]-~]+", url):  # no white space, no backslash, nothing that parsers disagree on
            raise _refused(url, "it contains characters that are not allowed in URLs")
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".")
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _refused(url, "it is not a URL") from None
        if parts.scheme not in PORTS or not host:
            raise _refused(url, "only http and https URLs are allowed")
        if parts.username is not None or parts.password is not None:
            raise _refused(url, "it contains a user name")
        if port not in self.ports:
            raise _refused(url, f"port {port} is not one of {', '.join(map(str, self.ports))}")
        if not any(
            domain == "*" or (host.endswith(domain) if domain.startswith(".") else host == domain)
            for domain in map(str.lower, self.domains)
        ):
            raise _refused(url, "its host is not in --allow-images-from")
        return parts, host, port


class _Pinned(http.client.HTTPConnection):
    """Connects to a given address instead of resolving the host's name. Everything has to end by ``end_s``
    (monotonic)."""

    def __init__(self, address: str, host: str, port: int, *, is_secure: bool, end_s: float) -> None:
        super().__init__(host, port)
        if is_secure:
            self.default_port = PORTS["https"]  # so that the Host header omits the port
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
            # The plain socket is useless once it is wrapped, so `abort` has to get the TLS socket before the handshake.
            self.sock = self._raw = ssl.create_default_context().wrap_socket(
                self._raw, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()

    def abort(self) -> None:
        """End any blocking call, from another thread."""
        if self._raw is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._raw, socket.SHUT_RDWR)  # below TLS: another thread is reading


def _refused(url: str, reason: str) -> ApiError:
    return ApiError(400, "image_address_refused", f"{_short(url)}: is not downloaded: {reason}", param="image")


def _short(url: str) -> str:
    printable = url if url.isprintable() else repr(url)
    return printable if len(printable) <= 120 else f"{printable[:117]}..."
