"""Reduces a PNG to the chunks that its pixels need, and extracts its colour profile.

Pillow unpacks texts and the profile on opening, and refuses the image if they exceed a limit for the whole process.
Only the orientation among them is needed here.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import IO

SIGNATURE_BYTES = 8
NEEDED = (b"tRNS", b"eXIf")
"""Kept beside the critical chunks, whose names begin with a capital. Without animation chunks the first frame
remains."""
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
TURNING = {b"XML:com.adobe.xmp": b"iTXt", b"Raw profile type exif": b"tEXt"}
"""Texts that may hold an orientation, and the chunk type in which Pillow reads them uncompressed."""
MAX_UNPACKED = 16 * 2**20
"""Maximum bytes of an unpacked text or profile; a larger one is skipped."""


def strip_png(stream: IO[bytes]) -> tuple[IO[bytes], bytes | None]:
    """The PNG in ``stream`` as another stream, and its unpacked ICC profile if it has a valid one.

    Damage to the pixels is kept, for Pillow to find. Reads no further than the end of the image.
    """
    kept = [stream.read(SIGNATURE_BYTES)]
    profile: bytes | None = None
    unpacked: set[bytes] = set()  # each kind once: a file may hold a thousand that unpack to a huge size
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
    """A chunk of `TURNING`, unpacked; empty if that is not possible."""
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
    """The unpacked data; None if it is not a zlib stream, or is too large."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, MAX_UNPACKED)
    except zlib.error:
        return None
    return found if unpacker.eof else None
