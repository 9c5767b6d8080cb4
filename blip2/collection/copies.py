"""Images of equal content: the first of them is seen, the others have its result."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass

from blip2.collection.record import Record, Result, sha256_of


@dataclass(slots=True, eq=False)
class First:
    """An image that no earlier one equals, and its result when there is one."""

    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A record, without its image, that equals ``first``; ``result``: what is known of the record itself."""

    record: Record
    result: Result
    first: First


class Copies:
    """The images of one unit by their content, byte by byte, and by what is asked about them.

    A file is read only if another one has its size. What has an address is known by that.
    """

    def __init__(self) -> None:
        self._by_content: dict[Hashable, First] = {}
        self._alone: dict[Hashable, tuple[str, First] | None] = {}
        """By size, the file that is the only one so far; None where there were several."""

    def first(self, record: Record, new: First) -> First:
        """Of an image that was there before, what it was given then; else ``new``."""
        picture = record.picture
        if picture is None or picture == "-":
            return new
        if isinstance(picture, bytes):
            return self._by_content.setdefault((record.asked, sha256_of(picture)), new)
        try:
            size = os.stat(picture).st_size
        except (OSError, ValueError):  # an address, or what will be told in its place
            return self._by_content.setdefault((record.asked, picture), new)
        if (record.asked, size) not in self._alone:
            self._alone[record.asked, size] = picture, new
            return new
        if (other := self._alone[record.asked, size]) is not None:
            if other[0] == picture:  # as of rows that name one file several times
                return other[1]
            self._alone[record.asked, size] = None
            self._by_content[record.asked, sha256_of(other[0]) or other[0]] = other[1]
        return self._by_content.setdefault((record.asked, sha256_of(picture) or picture), new)
