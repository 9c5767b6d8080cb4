"""Loads the images of rows, and prepares batches ahead of time.

B batch rows, H and W pixels.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip2.data.joined import Joined, image_of
from blip2.data.sample import Row
from blip2.disk import Stamp, digest_of_bytes, digest_since, stamp_of
from blip2.errors import ImageError
from blip2.image import augmented, randaugmented, squared, to_pixels

Batch = TypeVar("Batch")


class LoadedImage(NamedTuple):
    """An image that was read, for its features."""

    pixels: Tensor | ImageError
    """Its pixels ``float32[3, H, W]``, or its error."""
    stamp: Stamp | None
    """Of the file that contains it, before it was read."""
    digest: str
    """Of its own bytes, see `disk.digest_of`; "" if unknown, or if the file may have changed."""


class RowImages:
    """The distinct images of some rows, numbered in order of appearance and decoded by threads on demand. With `Joined`
    rows each row has its own image, with the number of the row, and ``paths`` is empty, unless ``is_distinct``: then
    all places are looked up, and rows with the same image file share an image.

    ``number_of_row`` int64[rows]: the image of each row. ``paths``: for each image the file that contains it, which may
    contain other images as well.
    """

    def __init__(
        self,
        rows: Sequence[Row] | Joined,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resample: str = "bicubic",
        shortest_edge: int | None = None,
        threads: int = 0,
        is_distinct: bool = False,
        is_randaugmented: bool = False,
    ) -> None:
        self._rows = rows
        self.paths: list[str] = []
        self.number_of_row: np.ndarray | None = None
        self._row_of_image: list[int] = []
        if is_distinct or not isinstance(rows, Joined):
            self._look_up()
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.resizing = (resample, shortest_edge)
        self._is_randaugmented = is_randaugmented
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self._rows) if self.number_of_row is None else len(self.paths)

    def _look_up(self) -> None:
        numbers: dict[str, int] = {}
        number_of_row = np.empty(len(self._rows), np.int64)
        for row in range(len(self._rows)):
            path, is_own = self._rows.place(row) if isinstance(self._rows, Joined) else (self._rows[row].image, True)
            number = numbers.setdefault(path, len(self.paths)) if is_own else len(self.paths)
            if number == len(self.paths):
                self.paths.append(path)
                self._row_of_image.append(row)
            number_of_row[row] = number
        self.number_of_row = number_of_row

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The image numbers int64[B] of rows."""
        return rows if self.number_of_row is None else self.number_of_row[rows]

    def name(self, number: int) -> str:
        """The name of an image in messages."""
        return self._rows[self._row(number)].image

    def _row(self, number: int) -> int:
        """The first row with this image."""
        return number if self.number_of_row is None else self._row_of_image[number]

    def _whole(self, number: int) -> Row:
        """The row, with the content of an image inside another file. Raises ImageError."""
        row = self._row(number)
        return self._rows.whole(row) if isinstance(self._rows, Joined) else self._rows[row]

    def pixels(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Normalised pixels ``float32[B, 3, H, W]`` of images. Raises ImageError."""
        read = self.read(numbers)
        for found in read:
            if isinstance(found, ImageError):
                raise found
        return torch.stack([found for found in read if isinstance(found, Tensor)])

    def read(
        self, numbers: Sequence[int] | np.ndarray, chances: Iterable[random.Random | None] = repeat(None)
    ) -> list[Tensor | ImageError]:
        """The pixels ``float32[3, H, W]`` of each image, or its error.

        ``chances``: random generators for `augmented` and, if set, `randaugmented`; None leaves an image unchanged.
        """
        return list(self._pool.map(self._one, map(int, numbers), chances))

    def load(self, numbers: Sequence[int]) -> list[LoadedImage]:
        """Load distinct images, for their features."""
        return list(self._pool.map(self._load, numbers))

    def digest(self, number: int) -> tuple[Stamp | None, str]:
        """Stamp and digest as in `LoadedImage`, without the pixels."""
        stamp = stamp_of(self.paths[number])
        try:
            return stamp, self._digest_since(number, self._whole(number), stamp)
        except ImageError:
            return stamp, ""

    def _load(self, number: int) -> LoadedImage:
        stamp = stamp_of(self.paths[number])
        try:
            row = self._whole(number)
        except ImageError as error:
            return LoadedImage(error, stamp, "")
        found = self._pixels(row, None)
        return LoadedImage(found, stamp, self._digest_since(number, row, stamp))

    def _digest_since(self, number: int, row: Row, stamp: Stamp | None) -> str:
        if row.content is None:
            return digest_since(self.paths[number], stamp)
        return digest_of_bytes(row.content) if stamp is not None and stamp == stamp_of(self.paths[number]) else ""

    def _one(self, number: int, chance: random.Random | None) -> Tensor | ImageError:
        try:
            return self._pixels(self._whole(number), chance)
        except ImageError as error:
            return error

    def _pixels(self, row: Row, chance: random.Random | None) -> Tensor | ImageError:
        try:
            image = image_of(row)
        except ImageError as error:
            return error
        resample, edge = self.resizing
        if chance is not None:
            image = augmented(image, chance)
            if self._is_randaugmented:  # its strengths are in pixels of the model's input
                image = randaugmented(squared(image, size=self.size, resample=resample, shortest_edge=edge), chance)
                edge = None
        [pixels_CHW] = to_pixels(
            [image], size=self.size, mean=self.mean, std=self.std, resample=resample, shortest_edge=edge
        )
        return pixels_CHW


class BadImages:
    """The images that could not be read: path to error message. With "stop" the first one is raised."""

    def __init__(self, on_bad_picture: Literal["skip", "stop"]) -> None:
        self._is_error = on_bad_picture == "stop"
        self.found: dict[str, str] = {}

    def note(self, path: str, error: ImageError) -> None:
        """Raises the error if the recipe says so. Thread-safe."""
        if self._is_error:
            raise ImageError(f'{error}; or skip such images: data.on_bad_picture = "skip"') from error
        self.found.setdefault(path, str(error))


def prefetch(make: Callable[[int], Batch], steps: range, ahead: int = 2) -> Generator[Batch, None, None]:
    """``make(step)`` for every step, in order, computed by a thread up to ``ahead`` batches ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(make, step))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
