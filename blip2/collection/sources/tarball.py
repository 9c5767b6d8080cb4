"""The members of a tar file in their order, plain or packed by gzip, bzip2 or xz.

Python's tarfile takes a damaged header for the end of the file, and so would lose what comes after it without a word.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO, cast

PIECE_BYTES = 2**16
MAGIC = slice(257, 262)
"""Where "ustar" stands."""
PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError)


class Damage(Exception):
    """Why a tar file cannot be read any further."""


class Member:
    """``read`` gives its bytes as long as the next member is not asked for. Raises Damage. ``start`` and ``stop``:
    where it lies in its file, with its header and what fills its last block."""

    def __init__(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        self._tar = tar
        self._info = info
        self.name = info.name
        self.size = info.size
        self.is_file = info.isreg()
        self.start = info.offset
        self.stop = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * self.is_file

    def read(self) -> bytes:
        try:
            found = self._tar.extractfile(self._info)
            content = b"" if found is None else found.read()
        except ERRORS as error:
            raise Damage(_reason(error)) from None
        if len(content) != self.size:
            raise Damage("it ends too early")
        return content


def is_tar(path: str) -> bool:
    """Whether it begins as one, also if it is packed. Opens the file."""
    try:
        next(members(path), None)
    except Damage:
        return False
    return True


def members(path: str) -> Iterator[Member]:
    """Files and links; folders and devices are passed over. Raises Damage where there is no more to be read."""
    try:
        # tarfile itself would not look at the checksum of what gzip packed.
        with _opened(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
            yield from _members(tar)
            _check_end(tar)
    except Damage:
        raise
    except ERRORS as error:
        raise Damage(_reason(error)) from None


def names(path: str, most: int) -> Iterator[Member]:
    """As `members`, but what is in a plain file is not read, only skipped; of a packed one only the first ``most``."""
    try:
        with _opened(path) as stream:
            is_plain = isinstance(stream, io.BufferedReader)
        if is_plain:
            with tarfile.open(path, "r:", tarinfo=_Header) as tar:
                yield from _members(tar)
    except ERRORS as error:
        raise Damage(_reason(error)) from None
    if not is_plain:
        yield from islice(members(path), most)


def members_of(content: bytes) -> Iterator[Member]:
    """The members in a piece of a plain tar file. Raises Damage."""
    end_mark = bytes(2 * tarfile.BLOCKSIZE)
    try:
        with tarfile.open(fileobj=io.BytesIO(content + end_mark), mode="r:", tarinfo=_Header) as tar:
            yield from _members(tar)
    except ERRORS as error:
        raise Damage(_reason(error)) from None


def is_packed(path: str) -> bool:
    """Raises OSError."""
    with _opened(path) as stream:
        return not isinstance(stream, io.BufferedReader)


def _members(tar: tarfile.TarFile) -> Iterator[Member]:
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
        if info.isreg() or info.islnk() or info.issym():
            yield Member(tar, info)


def _opened(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        start = file.read(MAGIC.stop)
    opener = next((opener for mark, opener in PACKED.items() if start.startswith(mark)), open)
    return cast(BinaryIO, opener(path, "rb"))


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "there is no end mark") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """After the end mark there is nothing but zeros, or else it is none."""
    stream: Any = tar.fileobj
    while piece := stream.read(PIECE_BYTES):
        if piece.strip(b"\0"):
            raise Damage("there is more after its end mark, as in tar files that were joined, or a damaged one")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
