"""The vectors of an open index: read when they are asked for, and known to be what was written."""

from __future__ import annotations

import math
import os
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2.errors import IndexFileError

READERS = 2
"""Threads that read and check while what was read before is worked on."""


class OpenFile:
    """A file that stays the one it was when it was opened, also if another takes its place.

    Not mapped: to read what another program has cut off would end the process. ``held``: whether it is kept open; there
    may be more parts of an unfinished index than a process may have files, and their names stay theirs.
    """

    def __init__(self, path: Path, held: bool = True) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if held else None
        if self._handle is not None:
            weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, into: memoryview) -> None:
        """Fill ``into`` from there on. Raises IndexFileError if it cannot be read, or ends before."""
        try:
            if self._handle is not None and hasattr(os, "preadv"):
                while len(into) and (count := os.preadv(self._handle, [into], start)):
                    start, into = start + count, into[count:]
            else:
                with open(self.path if self._handle is None else os.dup(self._handle), "rb", buffering=0) as file:
                    file.seek(start)
                    while len(into) and (count := file.readinto(into) or 0):
                        into = into[count:]
        except OSError as error:
            raise IndexFileError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
        if len(into):
            raise IndexFileError(
                f"{self.path}: was cut short while it was open; make it again with blip2 index, and open it anew"
            )

    def stamp(self) -> tuple[int, int]:
        """Bytes, and nanoseconds of the last change."""
        found = os.stat(self.path if self._handle is None else self._handle)
        return found.st_size, found.st_mtime_ns

    def mapped(self, start: int, shape: Sequence[int]) -> Tensor:
        """``float16[shape]`` from there on, mapped. Raises IndexFileError if the file is not that long any more."""
        end = start + 2 * math.prod(shape)
        if self.stamp()[0] < end:
            self.read(end, memoryview(bytearray(1)))
        with open(self.path if self._handle is None else os.dup(self._handle), "rb") as file:
            # A private copy of what would be written to, which nobody does: torch wants no array that cannot be.
            return torch.from_numpy(np.memmap(file, np.float16, "c", start, tuple(shape)))


class Rows:
    """``float16[N, ...]`` in a file. As far as a search goes it is used as a tensor is: ``shape``, ``len``,
    ``rows[numbers]`` and `split`.

    Each row is compared with its checksum when it is first read, and again if the file was changed since. Raises
    IndexFileError for one that is not what was written, or that cannot be read.
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
        """The same rows, each of another shape."""
        other = object.__new__(Rows)
        other.__dict__ |= self.__dict__  # what is known of them, too
        other.shape = (len(self), *shape)
        return other

    def __getitem__(self, numbers: Tensor | np.ndarray) -> Tensor:
        """``float16[B, ...]``: these rows, in this order."""
        self._look_for_changes()
        found = torch.empty(len(numbers), *self.shape[1:], dtype=torch.float16)
        for place, number in enumerate(numbers.tolist()):
            self._read(number, found[place : place + 1])
        return found

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in portions of ``size``, of which the last may be smaller; each is good until the next is taken."""
        self._look_for_changes()
        buffers = [
            torch.empty(min(size, len(self)), *self.shape[1:], dtype=torch.float16)
            for _ in range(min(READERS + 1, -(-len(self) // size)))
        ]

        def portion(first: int) -> Tensor:
            into = buffers[first // size % len(buffers)][: len(self) - first]
            self._read(first, into)
            return into

        with ThreadPoolExecutor(READERS, thread_name_prefix="blip2 index") as readers:
            waiting: deque[Future[Tensor]] = deque()
            for first in range(0, len(self), size):
                if len(waiting) == len(buffers):
                    yield waiting.popleft().result()
                waiting.append(readers.submit(portion, first))
            while waiting:
                yield waiting.popleft().result()

    def _read(self, first: int, into: Tensor) -> None:
        """Rows from ``first`` on, checked."""
        content = memoryview(into.view(-1).numpy()).cast("B")  # type: ignore[arg-type]
        self._file.read(self._start + first * self._row_bytes, content)
        last = first + len(into)
        if self._is_known_N[first:last].all():
            return
        for number, wanted in enumerate(self._crc32_N[first:last].tolist()):
            if zlib.crc32(content[number * self._row_bytes : (number + 1) * self._row_bytes]) != wanted:
                raise IndexFileError(
                    f"{self._file.path}: is damaged (what it holds of {self._name(first + number)} is not what was "
                    "written); delete it, and make it again with blip2 index"
                )
        self._is_known_N[first:last] = True

    def _look_for_changes(self) -> None:
        if (stamp := self._file.stamp()) != self._stamp:
            self._is_known_N[:] = False
            self._stamp = stamp
