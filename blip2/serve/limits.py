"""What a stranger may ask for, and how much; each limit is enforced before the work that it guards."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from blip2.errors import OptionError, option


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Counts are 1 or more, times in seconds."""

    max_body_bytes: int = 20 * 2**20
    """Of a request, counted while it is read."""
    body_s: float = 30.0
    """A body that has not arrived after that time is given up (408); one that hardly comes, before."""
    max_flight_bytes: int | None = None
    """Of all bodies that are being received, or are there and still needed; None: 16 times ``max_body_bytes``. Beyond
    it the oldest that is still coming gives way (503)."""
    max_pixels: int = 250_000_000
    """Of an image, from its header. A large one is decoded while no other is; it takes 4 to 9 bytes a pixel."""
    max_images: int = 32
    """In one request, those of earlier turns of a conversation included."""
    max_texts: int = 256
    """In one request: to match, or to embed."""
    max_prompt_tokens: int = 2048
    """Of text; a model that reads less says so itself. Of 16 characters a token, no more are even looked at."""
    max_new_tokens: int = 512
    """That a request gets; one that asks for more gets these."""
    max_queue: int = 128
    """Requests whose body is there, those at work included; the next one is sent away (429). One client has three
    quarters of these places at most, and of ``max_flight_bytes``."""
    max_connections: int = 1024
    """At the next one, a connection that does nothing is closed; see `blip2.serve.house`. Fewer where the system does
    not give so many descriptors."""
    max_rows: int = 64
    """Answers that are written at a time; a search with 5 beams, as the tasks have it, is 5. A quarter as many are
    written beside a search that takes them all, of those who ask for little (`lanes`)."""
    deadline_s: float = 120.0
    """From the last byte of the request to the last of the answer (504)."""
    shutdown_s: float = 30.0
    """How long a stop signal waits for what is running."""
    cache_entries: int = 4096
    """Encoded images that are remembered."""
    cache_bytes: int = 512 * 2**20
    """What these may take, of each of the two models."""
    system_prompt: Literal["refuse", "ignore"] = "refuse"
    """What is done with a system message, which the model cannot follow."""

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
    """How many of so many one client may have: three quarters, so that something is left for others; of one, one."""
    return number - number // 4
