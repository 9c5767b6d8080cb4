"""What the head of a file tells of its image: no pixel is decoded."""

from __future__ import annotations

import io
import os
from contextlib import suppress

from blip2.image.formats import HEAD_BYTES, SPOKEN, format_of
from blip2.image.quiet import quiet


def stored_size(source: str | bytes) -> tuple[int, int] | None:
    """Width and height as a file (a path, or its bytes) has them, before any turn; None where they cannot be read."""
    with suppress(Exception), quiet():  # the codecs raise whatever they stumble over; who decodes it tells what
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
    """What a file is by its content, as people call it, and the suffixes that its like have; None if it is unknown."""
    with suppress(OSError), open(source, "rb") as stream:
        if (format := format_of(stream.read(HEAD_BYTES))) is not None:
            return SPOKEN.get(format.name, format.name), format.suffixes
    return None
