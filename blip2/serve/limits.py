"""Limits on requests; each is enforced before the work that it limits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from blip2.errors import OptionError, option


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Counts are 1 or more, times in seconds."""

    max_body_bytes: int = 20 * 2**20
    """Bytes of a request, counted while it arrives."""
    body_s: float = 30.0
    """Time for a body to arrive (408); one that arrives too slowly is ended earlier."""
    max_flight_bytes: int | None = None
    """Bytes of all bodies that are arriving or still needed; None: 16 times ``max_body_bytes``. Beyond it the oldest
    one that is still arriving is dropped (503)."""
    max_pixels: int = 250_000_000
    """Pixels of an image, from its header. Large images are decoded one at a time; that takes 4 to 9 bytes per
    pixel."""
    max_images: int = 32
    """Images of a request, including those of earlier turns."""
    max_texts: int = 256
    """Texts of a request, to match or to embed."""
    max_prompt_tokens: int = 2048
    """Tokens of a text; a model with a shorter context refuses earlier. Longer than 16 characters per token: unread."""
    max_new_tokens: int = 512
    """Maximum tokens to generate; a request for more gets this many."""
    max_queue: int = 128
    """Requests with a complete body, running ones included; the next one is refused (429). One client has at most three
    quarters of these places, and of ``max_flight_bytes``."""
    max_connections: int = 1024
    """With one more, an idle connection is closed; see `blip2.serve.connections`. Fewer if the system does not grant as
    many file descriptors."""
    max_rows: int = 64
    """Rows of the running batch; the tasks' default of 5 beams takes 5. A quarter as many run beside a search that
    takes them all, for small requests (`lanes`)."""
    deadline_s: float = 120.0
    """Time from the last byte of the request to the last of the answer (504)."""
    shutdown_s: float = 30.0
    """Time to finish running requests after a stop signal."""
    cache_entries: int = 4096
    """Encoded images in the cache."""
    cache_bytes: int = 512 * 2**20
    """Bytes of the cache, for each of the two models."""
    system_prompt: Literal["refuse", "ignore"] = "refuse"
    """What to do with a system message, which the model cannot follow."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, str):
                continue
            least = 0 if field.name.startswith("cache") else 1 if "int" in str(field.type) else 1e-3
            if not value >= least:
                raise OptionError(f"{option(field.name)} is {value}; use {least} or more")
        if self.flight_bytes < self.max_body_bytes:
            raise OptionError(
                f"{option('max_flight_bytes')} is {self.flight_bytes}, less than {option('max_body_bytes')}, which is "
                f"{self.max_body_bytes}; use that or more"
            )

    @property
    def flight_bytes(self) -> int:
        return 16 * self.max_body_bytes if self.max_flight_bytes is None else self.max_flight_bytes


def share_of(number: int) -> int:
    """How many of ``number`` one client may have: three quarters, so that some are left for others; of one, one."""
    return number - number // 4
