"""The vectors of an open index, read on demand and checked."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from blip2 import native
from blip2.disk import OpenFile
from blip2.errors import IndexFileError

T = TypeVar("T")


class Rows:
    """``float16[N, ...]`` in a file: ``rows[numbers]`` as for a tensor, and `each`.

    Each row is compared with its checksum when it is first read, and again if the file has changed since. Raises
    IndexFileError for a row that does not match, or cannot be read.
    """

    def __init__(
        self, file: OpenFile, start: int, shape: Sequence[int], crc32_N: np.ndarray, name: Callable[[int], str]
    ) -> None:
        self.shape = tuple(shape)
        self._file, self._start, self._crc32_N, self._name = file, start, crc32_N, name
        self._row_bytes = 2 * math.prod(self.shape[1:])
        self._is_known_N = np.zeros(len(crc32_N), bool)
        self._stamp = file.stamp()

    def __len__(self) -> int:
        return self.shape[0]

    def viewed(self, *shape: int) -> Rows:
        """The same rows, each with another shape."""
        other = object.__new__(Rows)
        other.__dict__ |= self.__dict__  # shares the record of checked rows
        other.shape = (len(self), *shape)
        return other

    def __getitem__(self, numbers: Tensor | np.ndarray) -> Tensor:
        """``float16[B, ...]``: these rows, in this order."""
        self._look_for_changes()
        found = torch.empty(len(numbers), *self.shape[1:], dtype=torch.float16)
        for place, number in enumerate(numbers.tolist()):
            self._read(number, found[place : place + 1])
        return found

    def each(self, portion: Callable[[Tensor], T], size: int) -> Iterator[T]:
        """The results of ``portion`` for every ``size`` rows, in order, with as many threads as torch may use.

        Each thread has one buffer, so that the data is still in its cache when it is processed; ``portion`` must not
        keep a reference to it.
        """
        self._look_for_changes()
        own = threading.local()

        def work(first: int) -> T:
            if not hasattr(own, "memory"):
                own.memory = torch.empty(min(size, len(self)), *self.shape[1:], dtype=torch.float16)
            rows = own.memory[: len(self) - first]
            self._read(first, rows)
            return portion(rows)

        with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="blip2 index") as pool:
            yield from pool.map(work, range(0, len(self), size))

    def _read(self, first: int, into: Tensor) -> None:
        """Read rows from ``first`` on, checked."""
        content = memoryview(into.view(-1).numpy()).cast("B")  # type: ignore[arg-type]
        self._fill(first * self._row_bytes, content)
        last = first + len(into)
        if self._is_known_N[first:last].all():
            return
        found_B = native.checksums(into)
        if found_B is None:
            size = self._row_bytes
            found_B = np.array([zlib.crc32(content[at : at + size]) for at in range(0, len(content), size)], np.uint32)
        if (wrong := np.flatnonzero(found_B != self._crc32_N[first:last])).size:
            raise IndexFileError(
                f"{self._file.path}: is damaged (the vectors of {self._name(first + int(wrong[0]))} do not match their "
                "checksum); delete it, and make it again with blip2 index"
            )
        self._is_known_N[first:last] = True

    def _fill(self, start: int, into: memoryview) -> None:
        try:
            self._file.read(self._start + start, into)
        except OSError as error:
            raise IndexFileError(
                f"{self._file.path}: cannot be read ({error.strerror or error}); if another program changed it, open "
                "it again, or make it again with blip2 index"
            ) from None

    def _look_for_changes(self) -> None:
        if (stamp := self._file.stamp()) != self._stamp:
            self._is_known_N[:] = False
            self._stamp = stamp

    def mapped(self) -> Tensor:
        """``float16[N, ...]``, memory-mapped and not checked. Raises IndexFileError if the file is too short."""
        self._fill(len(self) * self._row_bytes - 1, memoryview(bytearray(1)))
        with self._file.reopened() as file:
            # Copy-on-write, although nobody writes: torch does not accept read-only arrays.
            return torch.from_numpy(np.memmap(file, np.float16, "c", self._start, self.shape))


def each(rows: Rows | Tensor, portion: Callable[[Tensor], T], size: int) -> Iterator[T]:
    """As `Rows.each`, also for vectors in memory."""
    return rows.each(portion, size) if isinstance(rows, Rows) else map(portion, rows.split(size))
