"""Messages between the server and its readers: a little JSON, and bytes.

No pickle: whoever has taken over a reader, by a fault in a decoder, can send it wrong numbers and nothing else.
"""

from __future__ import annotations

import json
import struct
from typing import Any

HEAD = struct.Struct("<IQ")
"""The lengths of the JSON and of the bytes."""
COMMAND = struct.Struct("<ci")
"""To the parent of the readers: what to do, and a process id."""
UNKNOWN = 1000
"""Its answer where a process is not its own."""
MAX_JSON_BYTES = 2**26
MAX_PAYLOAD_BYTES = 2**32

Message = tuple[dict[str, Any], bytes]


def packed(told: dict[str, Any], num_payload_bytes: int) -> bytes:
    """What goes before the payload."""
    content = json.dumps(told, separators=(",", ":")).encode()
    return HEAD.pack(len(content), num_payload_bytes) + content


def lengths(head: bytes | bytearray) -> tuple[int, int]:
    """Raises ValueError for what no reader of ours sends."""
    found: tuple[int, int] = HEAD.unpack(head)
    if found[0] > MAX_JSON_BYTES or found[1] > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a message of {found[0]:,} and {found[1]:,} bytes")
    return found
