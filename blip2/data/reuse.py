"""Features of the same images in other sets of a folder, so that only new images are computed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.kept import UNKNOWN, read_records
from blip2.disk import OpenFile

ALIKE = ("vision", "pixels", "dtype", "settings")
"""Header fields that have to be equal so that equal images have equal features."""


class Elsewhere:
    """The complete feature sets of ``folder`` other than ``name``, if their header fits ``header``; unreadable ones are
    skipped."""

    def __init__(self, folder: Path, name: str, header: dict[str, Any], row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._places: dict[bytes, tuple[OpenFile, int, int]] = {}
        for description in sorted(folder.glob("*.json")):
            try:
                found = json.loads(description.read_text("utf-8"))
                if description.stem == name or any(found[key] != header[key] for key in ALIKE):
                    continue
                file = OpenFile(description.with_suffix(".bin"))
                records = read_records(description.with_suffix(".seen"), found["shape"][0])
            except (OSError, ValueError, LookupError, TypeError):
                continue
            for number in np.flatnonzero((records["crc32"] != 0) & (records["stamp"][:, 0] != UNKNOWN.size)).tolist():
                place = file, number, int(records[number]["features_crc32"])
                self._places.setdefault(records[number]["digest"].tobytes(), place)

    def row(self, digest: str) -> bytes | None:
        """The stored features of the image with this digest; None if missing or damaged."""
        if (place := self._places.get(bytes.fromhex(digest))) is None:
            return None
        file, number, crc32 = place
        content = bytearray(self._row_bytes)
        try:
            file.read(number * len(content), memoryview(content))
        except OSError:
            return None
        return bytes(content) if zlib.crc32(content) == crc32 else None
