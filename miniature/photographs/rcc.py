"""Files of a Qt resource (.rcc): a tree of names, and data that may be compressed with zlib.

Layout: Qt's ``qresource.cpp``. All numbers are big-endian. The header: "qres", version, offsets of tree, data, names.
A node of the tree has 14 bytes, and 8 more, a time, from version 2 on: name, flags, then of a folder how many children
it has and the number of the first, of a file its country, language and data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

COMPRESSED, FOLDER, ZSTD = 1, 2, 4


def files_in(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each file's path within the resource, and its content. Raises ValueError for what is no such file."""
    content = path.read_bytes()
    if content[:4] != b"qres":
        raise ValueError(f"{path}: is no Qt resource; name a .rcc file")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    node_bytes = 14 if version < 2 else 22

    def visit(number: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", content, tree + number * node_bytes)
        length = struct.unpack_from(">H", content, names + name)[0] if number else 0
        place = folder + content[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be")
        if flags & FOLDER:
            for child in range(second, second + first):
                yield from visit(child, f"{place}/" if place else "")
            return
        start = data + second
        size = struct.unpack_from(">I", content, start)[0]
        found = content[start + 4 : start + 4 + size]
        if flags & ZSTD:
            raise ValueError(f"{path}: {place} is compressed with zstd, which is not read here")
        yield place, zlib.decompress(found[4:]) if flags & COMPRESSED else found

    yield from visit(0, "")
