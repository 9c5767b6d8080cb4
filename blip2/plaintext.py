"""Text files of any editor: with or without a byte order mark, with any line endings.

Notepad and PowerShell begin UTF-8 files with a mark, and PowerShell's ``>`` writes UTF-16. A mark that is read as text
becomes an invisible character, so every text file is opened here.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

MARK = "\ufeff"
LONGEST_MARK = 4
PIECE_CHARS = 2**20
# The longest first: UTF-32's mark begins with UTF-16's.
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


class NotTextError(ValueError):
    """Bytes that are not text; the message continues "the file": "is not UTF-8 text ..."."""


def read_text(path: Path) -> str:
    """The whole file, with line ends as ``\\n``. Raises OSError, and `NotTextError` for bytes that are not text."""
    return "".join(read_lines(path))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, each with its ``\\n``, read on demand. Raises as `read_text` does."""
    with path.open("rb") as file:
        yield from lines_of(file)


def read_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of `PIECE_CHARS` characters, whether it has lines or not. Raises as `read_text`."""
    with path.open("rb") as file:
        yield from lines_of(file, piece_chars=PIECE_CHARS)


def lines_of(stream: BinaryIO, encoding: str = "utf-8", piece_chars: int = 0) -> Iterator[str]:
    """The lines of a stream as they arrive; ``encoding``: of a stream without a mark. ``piece_chars``: yield pieces of
    this many characters instead of lines."""
    buffered: Any = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(Any, stream))
    start = buffered.peek(LONGEST_MARK)[:LONGEST_MARK]
    encoding = next((name for mark, name in ENCODINGS if start.startswith(mark)), encoding)
    if encoding == "utf-8" and b"\0" in start:
        raise NotTextError("is not UTF-8 text (it contains NUL bytes, like UTF-16 without a mark); save it as UTF-8")
    text = io.TextIOWrapper(buffered, encoding)
    try:
        if piece_chars:
            yield from iter(lambda: text.read(piece_chars), "")
        # A file that was concatenated may have a mark at the start of any line.
        yield from (line.lstrip(MARK) for line in text)
    except UnicodeError as error:
        reason = " ".join(str(error).split())
        kind = encoding.removesuffix("-sig").upper()
        raise NotTextError(f"is not {kind} text ({reason}); save it as UTF-8") from None
    finally:
        text.detach()  # the caller closes the stream
        if buffered is not stream:
            buffered.detach()


def filled_lines(path: Path) -> list[str]:
    """The lines that are not blank, without white space at either end. Raises as `read_text` does."""
    return [line.strip() for line in read_lines(path) if line.strip()]
