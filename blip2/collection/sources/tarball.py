"""The members of a tar file in order, plain or compressed with gzip, bzip2 or xz.

Python's tarfile takes a damaged header for the end of the file, and would silently lose everything after it.
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
"""Offset of "ustar" in a header."""
PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError)


class Damage(Exception):
    """Why a tar file cannot be read any further."""


class Member:
    """``read`` returns its bytes until the next member is requested; raises Damage. ``start`` and ``stop``: its byte
    range in the file, with header and padding."""

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
            raise Damage("it is truncated")
        return content


def is_tar(path: str) -> bool:
    """Whether a file begins like a tar file, also a compressed one. Opens the file."""
    try:
        next(members(path), None)
    except Damage:
        return False
    return True


def members(path: str) -> Iterator[Member]:
    """Files and links; folders and devices are skipped. Raises Damage where the file cannot be read further."""
    try:
        # tarfile does not check the checksum of gzip data.
        with _opened(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
            yield from _members(tar)
            _check_end(tar)
    except Damage:
        raise
    except ERRORS as error:
        raise Damage(_reason(error)) from None


def names(path: str, most: int) -> Iterator[Member]:
    """Like `members`, but the contents of a plain tar are skipped, not read. Of a compressed one, only the first
    ``most``."""
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
    """Whether the file is compressed. Raises OSError."""
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
            raise tarfile.ReadError(str(error) or "there is no end marker") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """Check that only zeros follow the end marker."""
    stream: Any = tar.fileobj
    while piece := stream.read(PIECE_BYTES):
        if piece.strip(b"\0"):
            raise Damage("there is data after its end marker: tar files were joined, or it is damaged")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
