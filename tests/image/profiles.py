"""ICC profiles made by hand: of primaries, of grey, and of tables as printers have them."""

from __future__ import annotations

import struct

WHITE = (0.9642, 1.0, 0.8249)  # D50
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def of_primaries(primaries: tuple, gamma: float) -> bytes:
    """RGB by the XYZ of red, green and blue."""
    tags = [(b"wtpt", _xyz(WHITE))]
    for letter, value in zip("rgb", primaries, strict=True):
        tags += [(f"{letter}XYZ".encode(), _xyz(value)), (f"{letter}TRC".encode(), _curve(gamma))]
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def of_grey(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", [(b"wtpt", _xyz(WHITE)), (b"kTRC", _curve(gamma))])


def of_inks(lightness: float) -> bytes:
    """CMYK in which inks make grey of this lightness L* of 100; none of them is white, all of them are black."""
    ends = {0: 255, 15: 0}
    table = b"".join(bytes([ends.get(corner, round(lightness * 2.55)), 128, 128]) for corner in range(16))
    identity = struct.pack(">9i", *(65536 if place in (0, 4, 8) else 0 for place in range(9)))
    ramp = bytes(range(256))
    content = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    return _profile(b"prtr", b"CMYK", b"Lab ", [(b"wtpt", _xyz(WHITE)), (b"A2B0", content)])


def _xyz(values: tuple) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(kind: bytes, space: bytes, connection: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    tags = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + b"\0" * 79), *tags]
    tags = [(name, content + b"\0" * (-len(content) % 4)) for name, content in tags]
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"mine", 0x02400000, kind, space, connection)
    header = header.ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in WHITE))
    return header.ljust(128, b"\0") + table + body
