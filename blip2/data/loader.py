"""The pictures behind rows, and batches that are ready before they are needed.

B batch rows, H and W pixels.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip2.data.joined import Joined
from blip2.data.sample import Row
from blip2.errors import ImageError
from blip2.image import augmented, load_image, to_pixels

Batch = TypeVar("Batch")


class Pictures:
    """The distinct pictures of some rows, numbered in order of appearance; decoded by threads when asked for. Of
    `Joined` rows each has a picture of its own, under the row's number, and ``paths`` is empty.

    ``number_of_row`` int64[rows] tells the picture of each row: rows with the same number share a picture.
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
    ) -> None:
        numbers: dict[str, int] = {}
        self._joined = rows if isinstance(rows, Joined) else None
        listed = [] if isinstance(rows, Joined) else rows
        self.number_of_row = np.array([numbers.setdefault(row.image, len(numbers)) for row in listed])
        self.paths = list(numbers)
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.resizing = (resample, shortest_edge)
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self.paths) if self._joined is None else len(self._joined)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the pictures of the rows with these numbers, int64[B]."""
        return self.number_of_row[rows] if self._joined is None else rows

    def pixels(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Normalised pixels ``float32[B, 3, H, W]`` of the pictures with these numbers. Raises ImageError."""
        read = self.read(numbers)
        for found in read:
            if isinstance(found, ImageError):
                raise found
        return torch.stack([found for found in read if isinstance(found, Tensor)])

    def read(
        self, numbers: Sequence[int] | np.ndarray, chances: Iterable[random.Random | None] = repeat(None)
    ) -> list[Tensor | ImageError]:
        """The pixels ``float32[3, H, W]`` of each of the pictures with these numbers, or what is wrong with it.

        ``chances``: by which each is `augmented`; None leaves it as it is.
        """
        return list(self._pool.map(self._one, map(int, numbers), chances))

    def _one(self, number: int, chance: random.Random | None) -> Tensor | ImageError:
        try:
            if self._joined is None:
                image = load_image(self.paths[number], allow_truncated=None)
            else:
                image = self._joined.picture(number)
        except ImageError as error:
            return error
        if chance is not None:
            image = augmented(image, chance)
        resample, edge = self.resizing
        [pixels_CHW] = to_pixels(
            [image], size=self.size, mean=self.mean, std=self.std, resample=resample, shortest_edge=edge
        )
        return pixels_CHW


class BadPictures:
    """Those that could not be read, by path, each with what is wrong with it; or the first ends it all."""

    def __init__(self, on_bad_picture: Literal["skip", "stop"]) -> None:
        self._is_error = on_bad_picture == "stop"
        self.found: dict[str, str] = {}

    def note(self, path: str, error: ImageError) -> None:
        """Raises the error if the recipe says so. By any thread."""
        if self._is_error:
            raise ImageError(f'{error}; or pass such pictures over: data.on_bad_picture = "skip"') from error
        self.found.setdefault(path, str(error))


def prefetch(make: Callable[[int], Batch], steps: range, ahead: int = 2) -> Iterator[Batch]:
    """``make(step)`` for every step, in order; a thread works ``ahead`` batches ahead."""
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
