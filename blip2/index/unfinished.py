"""Results of an unfinished run: a folder beside the index, locked by one run at a time.

Every few hundred images become a small index in this folder, so that a killed run loses at most one of these. The next
run takes them over.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from blip2.disk import written
from blip2.errors import IndexFileError
from blip2.index.file import IndexedImage, Origin, Stored, read, write


class Unfinished:
    """The folder ``photos.index.unfinished``; `held` creates it."""

    def __init__(self, index: Path) -> None:
        self.index = index
        self.folder = index.with_name(f"{index.name}.unfinished")

    def shards(self) -> list[Stored]:
        """Small indexes left by earlier runs; unreadable ones are skipped, and their images are encoded again."""
        found = []
        for path in self._paths():
            with suppress(IndexFileError):
                found.append(read(path, held=False))
        return found

    @property
    def has_shards(self) -> bool:
        return bool(self._paths())

    def add(self, origin: Origin, rows: Sequence[tuple[IndexedImage, Tensor]]) -> None:
        """Store these images with their vectors. Raises IndexFileError if the disk is full."""
        number = 1 + max((int(path.stem) for path in self._paths()), default=0)
        self._write(self.folder / f"{number:08}.part", origin, [image for image, _ in rows], rows[0][1].shape,
                    (vectors_QD for _, vectors_QD in rows))  # fmt: skip

    def replace(
        self, origin: Origin, images: Sequence[IndexedImage], shape: Sequence[int], vectors: Iterable[Tensor]
    ) -> None:
        """Replace the index by these rows, atomically."""
        self._write(self.index, origin, images, shape, vectors)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.part") if path.stem.isdecimal())

    def _write(
        self,
        path: Path,
        origin: Origin,
        images: Sequence[IndexedImage],
        shape: Sequence[int],
        vectors: Iterable[Tensor],
    ) -> None:
        unnamed = self.folder / "writing"
        try:
            with written(path, unnamed):
                write(unnamed, origin, images, (shape[0], shape[1]), vectors)
        except OSError as error:
            raise IndexFileError(
                f"{path}: cannot be written ({error.strerror}); free some space, and repeat the command: finished "
                "work is kept"
            ) from None


@contextmanager
def held(index: Path) -> Iterator[Unfinished]:
    """Lock the folder for this run; it is removed when it is empty. Raises IndexFileError."""
    unfinished = Unfinished(index)
    folder = unfinished.folder
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        raise IndexFileError(f"{index}: another run is writing it; wait until it ends") from None
    except OSError as error:
        raise IndexFileError(
            f"{index}: cannot be written ({error.strerror}); check that its folder exists, and its permissions"
        ) from None
    finished = False
    try:
        yield unfinished
        finished = True
    finally:
        if finished or not unfinished.has_shards:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
