"""Images with identical content: only the first is processed, the others get its result."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass

from blip2.collection.record import Record, Result, sha256_of


@dataclass(slots=True, eq=False)
class First:
    """The first image with this content, and its result once there is one."""

    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A record, without its image, that equals ``first``. ``result``: what is known of this record itself."""

    record: Record
    result: Result
    first: First


class Copies:
    """The images of one unit, by their content (byte by byte) and their questions.

    A file is read only if another one has the same size. URLs are compared as text.
    """

    def __init__(self) -> None:
        self._by_content: dict[Hashable, First] = {}
        self._only_of_size: dict[Hashable, tuple[str, First] | None] = {}
        """For each size, the only file of that size so far; None if there were several."""

    def first(self, record: Record, new: First) -> First:
        """The `First` of an earlier equal image; else ``new``."""
        image = record.image
        if image is None or image == "-":
            return new
        if isinstance(image, bytes):
            return self._by_content.setdefault((record.asked, sha256_of(image)), new)
        try:
            size = os.stat(image).st_size
        except (OSError, ValueError):  # a URL, or a problem that is reported elsewhere
            return self._by_content.setdefault((record.asked, image), new)
        if (record.asked, size) not in self._only_of_size:
            self._only_of_size[record.asked, size] = image, new
            return new
        if (other := self._only_of_size[record.asked, size]) is not None:
            if other[0] == image:  # several rows may name the same file
                return other[1]
            self._only_of_size[record.asked, size] = None
            self._by_content[record.asked, sha256_of(other[0]) or other[0]] = other[1]
        return self._by_content.setdefault((record.asked, sha256_of(image) or image), new)
