"""A PNG with what its pixels need and no more, and its colour profile apart.

Pillow unpacks texts and profile while it opens a file, and refuses the image if they are larger than a limit that
holds for the whole process. Of all that, only what says how the image is to be turned is of use here.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import IO

SIGNATURE_BYTES = 8
NEEDED = (b"tRNS", b"eXIf")
"""Beside the critical chunks, whose names begin with a capital; without those of an animation its first frame stays."""
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
TURNING = {b"XML:com.adobe.xmp": b"iTXt", b"Raw profile type exif": b"tEXt"}
"""Texts that may say how the image is to be turned, and the chunk in which Pillow takes them unpacked."""
MAX_UNPACKED = 16 * 2**20
"""Of a text or a profile, in bytes; beyond that it is passed over."""


def essence(stream: IO[bytes]) -> tuple[IO[bytes], bytes | None]:
    """The PNG in ``stream`` as another stream, and its unpacked ICC profile if it has a sound one.

    What is cut or damaged of the pixels stays so, for Pillow to find. Reads no further than the end of the image.
    """
    kept = [stream.read(SIGNATURE_BYTES)]
    profile: bytes | None = None
    unpacked: set[bytes] = set()  # each once: a file may hold a thousand that unpack to as many times its size
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        body = stream.read(length + 4)
        if kind == b"iCCP" or kind in TEXTS:
            data = body[:length]
            keyword = kind if kind == b"iCCP" else data.partition(b"\0")[0]
            if keyword in unpacked:
                pass
            elif keyword == b"iCCP":
                profile = _unpacked(data.partition(b"\0")[2][1:])
            elif keyword in TURNING:
                kept.append(_turning(kind, data))
            unpacked.add(keyword)
        elif not kind[0] & 0x20 or kind in NEEDED:
            kept += [header, body]
        if kind == b"IEND" or len(body) < length + 4:
            break
    return io.BytesIO(b"".join(kept)), profile


def _turning(kind: bytes, data: bytes) -> bytes:
    """A chunk of `TURNING` again, unpacked; nothing if it cannot be."""
    keyword, _, rest = data.partition(b"\0")
    text: bytes | None = rest
    if kind == b"zTXt":
        text = _unpacked(rest[1:])
    elif kind == b"iTXt":
        is_packed, packed = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        text = _unpacked(packed) if is_packed else packed
    if text is None or len(text) > MAX_UNPACKED:
        return b""
    made = TURNING[keyword]
    content = keyword + (b"\0\0\0\0\0" if made == b"iTXt" else b"\0") + text
    return struct.pack(">I", len(content)) + made + content + struct.pack(">I", zlib.crc32(made + content))


def _unpacked(data: bytes) -> bytes | None:
    """None for what is no zlib stream, or too large."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, MAX_UNPACKED)
    except zlib.error:
        return None
    return found if unpacker.eof else None
