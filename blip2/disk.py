"""What is on the disk: written whole and synced before it has its name, and known again by its content.

Everything that this package writes comes through here. A file is written beside its place under another name, synced,
renamed, and its folder synced: after a loss of power there is the earlier file or the new one, whole.
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

# ---- written whole ----


@contextmanager
def written(path: PathLike, unfinished: Path | None = None) -> Iterator[Path]:
    """A name to write under; when the block ends, what was written there takes the place of ``path``, safe on the disk.

    If the block raises, nothing of it stays and ``path`` is as it was. ``unfinished``: the name to write under, beside
    ``path``, for those who are the only writer; by default one that no other has. What a link points to is replaced,
    not the link; a pipe or a device, which cannot be replaced, is written to. Raises OSError.
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
            shutil.copymode(place, unfinished)  # what was private stays so
        replace([(unfinished, place)])
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """All or nothing, see `written`. Raises OSError."""
    with written(path) as unfinished:
        unfinished.write_bytes(content)


def write_text(path: PathLike, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def replace(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each first to its second, in this order; all are on the disk before the first of them. Raises OSError."""
    if len(moves) == 1:
        sync(moves[0][0])
    elif moves:  # a disk syncs many at once in the time of one
        with ThreadPoolExecutor(min(len(moves), MAX_SYNCS)) as pool:
            for _ in pool.map(sync, [unfinished for unfinished, _ in moves]):
                pass
    for unfinished, path in moves:
        os.replace(unfinished, path)
    for folder in {path.parent for _, path in moves}:
        sync_folder(folder)
        sync_folder(folder.parent)  # the folder may be new itself


def link_or_copy(source: Path, path: Path) -> None:
    """A second name for a file, which is never written to by either; where the system has no such, a copy.

    Raises OSError.
    """
    try:
        os.link(os.path.realpath(source), path)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, path)


def sync(path: Path) -> None:
    """Have the system put a file on the disk, whoever wrote it. Raises OSError."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # to some systems reading is not enough
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """A rename is safe only when the folder itself is on the disk; some systems cannot open a folder for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process or thread comes here with this file, which is made with its folder, and stays.

    Raises BlockingIOError if one is there already, OSError if the file cannot be made.
    """
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"{path}: another run is at work") from None
    try:
        yield
    finally:
        lock.release()


# ---- read ----


class OpenFile:
    """A file that stays the one it was when it was opened, also if another takes its place.

    Not mapped: to look at what another program has cut off would end the process. ``held``: whether it is kept open;
    a process may not have as many files open as it likes. Raises OSError.
    """

    def __init__(self, path: PathLike, held: bool = True) -> None:
        self.path = Path(path)
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if held else None
        if self._handle is not None:
            weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, into: memoryview) -> None:
        """Fill ``into`` from there on; by any thread. Raises OSError if it cannot be read, or ends before."""
        if self._handle is not None and hasattr(os, "preadv"):
            while len(into) and (count := os.preadv(self._handle, [into], start)):
                start, into = start + count, into[count:]
        else:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                while len(into) and (count := file.readinto(into) or 0):
                    into = into[count:]
        if len(into):
            raise OSError("it is shorter than when it was opened, or was written")

    def stamp(self) -> Stamp | None:
        return stamp_of(self.path if self._handle is None else self._handle)

    def reopened(self) -> BinaryIO:
        """The same file once more, for others to read."""
        return open(self.path if self._handle is None else os.dup(self._handle), "rb")


# ---- known again ----


class Stamp(NamedTuple):
    """By which a file is known to be as it was, without reading it: bytes, and nanoseconds.

    ``mtime_ns``, of the last change of its content, can be set to anything (``cp -p``, ``rsync -t``, ``touch -r``);
    ``ctime_ns``, of the last change of whatever kind, only the system sets. 0: not known.
    """

    size: int
    mtime_ns: int
    ctime_ns: int = 0

    def is_still(self, now: Stamp | None) -> bool:
        """Whether what is there now is the same beyond doubt; if not, its content decides."""
        return now is not None and self[:2] == now[:2] and self.ctime_ns in (0, now.ctime_ns)


def stamp_of(path: PathLike | int) -> Stamp | None:
    """None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # On Windows this is the time of its making, which a new content leaves as it was: no harm.
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def digest_of(path: PathLike) -> str:
    """Of a file's content: 32 hexadecimal digits, or "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def digest_of_bytes(content: bytes) -> str:
    """As `digest_of`, of a file that has this content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_since(path: PathLike, stamp: Stamp | None) -> str:
    """Of the content that a file had since it was stamped, or "" if it may have changed meanwhile."""
    digest = digest_of(path)
    return digest if stamp is not None and stamp == stamp_of(path) else ""
