"""Messages between the server and its reader processes: a short JSON and a byte payload.

No pickle: if a decoder bug lets someone take over a reader, it can only send wrong numbers.
"""

from __future__ import annotations

import json
import struct
from typing import Any

HEAD = struct.Struct("<IQ")
"""Header: the lengths of the JSON and of the payload."""
COMMAND = struct.Struct("<ci")
"""Command to the parent of the readers: an action and a process id."""
UNKNOWN = 1000
"""Its answer: a process id, a status or an error number."""
MAX_JSON_BYTES = 2**26
MAX_PAYLOAD_BYTES = 2**32

Message = tuple[dict[str, Any], bytes]


def packed(message: dict[str, Any], num_payload_bytes: int) -> bytes:
    """The header and the JSON, sent before the payload."""
    content = json.dumps(message, separators=(",", ":")).encode()
    return HEAD.pack(len(content), num_payload_bytes) + content


def lengths(head: bytes | bytearray) -> tuple[int, int]:
    """The lengths in a header. Raises ValueError for sizes that no valid reader sends."""
    found: tuple[int, int] = HEAD.unpack(head)
    if found[0] > MAX_JSON_BYTES or found[1] > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a message of {found[0]:,} and {found[1]:,} bytes")
    return found
