"""Atomic, durable files, and recognition of files by their content.

The package writes all its files with this module. A file is written under another name in the same folder, synced,
renamed, and its folder synced: after a loss of power either the old or the new file exists, complete.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

PathLike = str | os.PathLike[str]
MAX_SYNCS = 8

# ---- writing ----


@contextmanager
def written(path: PathLike, unfinished: Path | None = None) -> Iterator[Path]:
    """A path to write to; at the end of the block that file replaces ``path`` durably.

    If the block raises, the file is removed and ``path`` is unchanged. ``unfinished``: the path to write to, beside
    ``path``, for a single writer; by default a unique one. The target of a link is replaced, not the link. A pipe or a
    device, which cannot be replaced, is written to directly. Raises OSError.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file() and not place.is_dir():
        yield Path(path)
        return
    if unfinished is None:
        unfinished = place.with_name(f".blip2-{secrets.token_hex(4)}.part{place.suffix}")
    try:
        yield unfinished
        with suppress(FileNotFoundError):
            shutil.copymode(place, unfinished)  # keep the permissions of a private file
        replace([(unfinished, place)])
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write all or nothing, see `written`. Raises OSError."""
    with written(path) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: PathLike, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def replace(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each first path to its second, in this order; all files are synced before the first rename. Raises
    OSError."""
    if len(moves) == 1:
        sync(moves[0][0])
    elif moves:  # syncing in parallel takes the time of one
        with ThreadPoolExecutor(min(len(moves), MAX_SYNCS)) as pool:
            for _ in pool.map(sync, [unfinished for unfinished, _ in moves]):
                pass
    for unfinished, path in moves:
        os.replace(unfinished, path)
    for folder in {path.parent for _, path in moves}:
        sync_folder(folder)
        sync_folder(folder.parent)  # the folder itself may be new


def link_or_copy(source: Path, path: Path) -> None:
    """A hard link to a file that is never changed; a copy where hard links are not possible.

    Raises OSError.
    """
    try:
        os.link(os.path.realpath(source), path)
    except OSError:  # another disk, or no support for hard links
        shutil.copyfile(source, path)


def sync(path: Path) -> None:
    """Sync a file to the disk, whoever wrote it. Raises OSError."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # some systems require write access
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Sync a folder, which makes renames durable; some systems cannot open folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is created with its folder and not removed. No other process or thread can hold it.

    Raises BlockingIOError if it is held already, OSError if the file cannot be created.
    """
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"{path}: another run is in progress") from None
    try:
        yield
    finally:
        lock.release()


# ---- reading ----


class OpenFile:
    """A file that stays the same after it was opened, even if its path is replaced.

    Not memory-mapped: if another program truncates the file, reading a map would kill the process. ``held``: whether it
    stays open; the number of open files is limited. Raises OSError.
    """

    def __init__(self, path: PathLike, held: bool = True) -> None:
        self.path = Path(path)
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if held else None
        if self._handle is not None:
            weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes from ``start`` on. Thread-safe. Raises OSError if they cannot be read or the
        file ends before."""
        if self._handle is not None and hasattr(os, "preadv"):
            while len(into) and (count := os.preadv(self._handle, [into], start)):
                start, into = start + count, into[count:]
        else:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                while len(into) and (count := file.readinto(into) or 0):
                    into = into[count:]
        if len(into):
            raise OSError("it is shorter than expected")

    def stamp(self) -> Stamp | None:
        return stamp_of(self.path if self._handle is None else self._handle)

    def reopened(self) -> BinaryIO:
        """The same file, opened again for other readers."""
        return open(self.path if self._handle is None else os.dup(self._handle), "rb")


# ---- recognition ----


class Stamp(NamedTuple):
    """Detects unchanged files without reading them: size in bytes, times in nanoseconds.

    ``mtime_ns``, the time of the last change of the content, can be set by programs (``cp -p``, ``rsync -t``, ``touch
    -r``); ``ctime_ns``, the time of the last change of any kind, is set only by the system. 0: unknown.
    """

    size: int
    mtime_ns: int
    ctime_ns: int = 0

    def is_still(self, now: Stamp | None) -> bool:
        """Whether the file is certainly unchanged; if not, its content decides."""
        return now is not None and self[:2] == now[:2] and self.ctime_ns in (0, now.ctime_ns)


def stamp_of(path: PathLike | int) -> Stamp | None:
    """The stamp of a path; None if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # On Windows this is the creation time, which does not change with the content: harmless.
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def digest_of(path: PathLike) -> str:
    """Hash of a file's content: 32 hexadecimal digits, or "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def digest_of_bytes(content: bytes) -> str:
    """As `digest_of`, for a file with this content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_since(path: PathLike, stamp: Stamp | None) -> str:
    """Hash of the content since a stamp was taken, or "" if it may have changed since."""
    digest = digest_of(path)
    return digest if stamp is not None and stamp == stamp_of(path) else ""
