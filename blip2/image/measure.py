"""Facts from the head of an image file, without decoding pixels."""

from __future__ import annotations

import io
import os
from contextlib import suppress

from blip2.image.formats import HEAD_BYTES, SPOKEN, format_of
from blip2.image.quiet import quiet


def stored_size(source: str | bytes) -> tuple[int, int] | None:
    """Width and height as stored in a file (a path, or its bytes), before any rotation; None if they cannot be read."""
    with suppress(Exception), quiet():  # codecs raise all kinds of exceptions; decoding reports them
        if isinstance(source, str) and not os.path.isfile(source):
            return None
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as stream:
            format = format_of(stream.read(HEAD_BYTES))
            stream.seek(0)
            if format is not None and not format.missing():
                width, height = format.read(stream).size
                return width, height
    return None


def named_format(source: str) -> tuple[str, tuple[str, ...]] | None:
    """The common name of a file's format by its content, and the suffixes of that format; None if it is unknown."""
    with suppress(OSError), open(source, "rb") as stream:
        if (format := format_of(stream.read(HEAD_BYTES))) is not None:
            return SPOKEN.get(format.name, format.name), format.suffixes
    return None
