"""Data sets that are too large for memory, and several data sets with their weights, as one sequence of rows."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from blip2.data.sample import Row
from blip2.errors import ImageError
from blip2.image import RgbImage, load_image

REMEMBERED = 8192
"""Number of cached rows, without images: the texts of a batch are read after its images."""


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def read(self, number: int) -> Row:
        """Thread-safe. Raises ImageError, with the place, for a row that cannot be read."""

    def place(self, number: int) -> tuple[str, bool]:
        """The file that contains the image, and whether it is the image file itself. Raises ImageError."""


@dataclass(frozen=True)
class Listed:
    """Rows in memory."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> Row:
        return self.rows[number]

    def place(self, number: int) -> tuple[str, bool]:
        return self.rows[number].image, True


class Joined:
    """The rows of data sets, one after another. ``weights``: their shares of the steps, see `Order`; ``change`` is
    applied to each row.

    An unreadable row has no texts.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        *,
        change: Callable[[Row], Row] = lambda row: row,
        most: int | None = None,
    ) -> None:
        self._datasets, self.weights = datasets, tuple(weights)
        self._change = change
        self.sizes = tuple(map(len, datasets))
        self._ends = [*accumulate(self.sizes)]
        self._count = min(self._ends[-1], self._ends[-1] if most is None else most)
        self._cached: OrderedDict[int, tuple[Row, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def first(self, most: int) -> Joined:
        return Joined(self._datasets, self.weights, change=self._change, most=most)

    def __getitem__(self, number: int) -> Row:
        """The row without the content of its image."""
        try:
            return self._remembered(number)[0]
        except ImageError as error:
            return Row(str(error).partition(": ")[0])

    def shown(self, number: int) -> int:
        """A 63-bit id of the image: equal for rows with the same file, or with the same content inside other files.
        Raises ImageError."""
        return self._remembered(number)[1]

    def _remembered(self, number: int) -> tuple[Row, int]:
        with self._lock:
            cached = self._cached.get(number)
        return self._read(number)[1] if cached is None else cached

    def whole(self, number: int) -> Row:
        """The row, with the content of an image inside another file. Raises ImageError."""
        return self._read(number)[0]

    def image(self, number: int) -> RgbImage:
        """Raises ImageError."""
        return image_of(self.whole(number))

    def place(self, number: int) -> tuple[str, bool]:
        """The file that contains the image, and whether it is the image file itself. Raises ImageError."""
        dataset, within = self._found(number)
        return dataset.place(within)

    def _found(self, number: int) -> tuple[Dataset, int]:
        which = bisect_right(self._ends, number)
        return self._datasets[which], number - (self._ends[which] - self.sizes[which])

    def _read(self, number: int) -> tuple[Row, tuple[Row, int]]:
        """A row, and what is cached of it."""
        dataset, within = self._found(number)
        row = self._change(dataset.read(within))
        shown = row.image.encode("utf-8", "surrogateescape") if row.content is None else row.content
        cached = replace(row, content=None), int.from_bytes(hashlib.sha256(shown).digest()[:8], "big") >> 1
        with self._lock:
            self._cached[number] = cached
            if len(self._cached) > REMEMBERED:
                self._cached.popitem(last=False)
        return row, cached


def image_of(row: Row) -> RgbImage:
    """The image of a row, from its content or its file. Raises ImageError."""
    if row.content is None:
        return load_image(row.image, allow_truncated=None)
    try:
        return load_image(row.content, allow_truncated=None)
    except ImageError as error:
        raise ImageError(f"{row.image}: {str(error).partition(': ')[2]}") from None
