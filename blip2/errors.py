"""User-facing errors: one line that says what is wrong, with which file or value, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

# Control characters that mark options within a message; they do not occur in normal text.
OPEN, CLOSE, IS = "\x0e", "\x0f", "\x1f"
MARKED = re.compile(rf"{OPEN}([^{IS}{CLOSE}]*)(?:{IS}([^{CLOSE}]*))?{CLOSE}")

Spelling = Callable[[str, str | None], str]
"""Formats an option: from its name, and the value to set if any, to the text for an interface."""


def option(name: str) -> str:
    """Marks the name of an option in a message; the command line writes its flag: num_beams, --beams."""
    return f"{OPEN}{name}{CLOSE}"


def setting(name: str, value: object) -> str:
    """Marks a remedy in a message: "set num_beams=1", "give --beams 1".

    False and None correspond to an absent flag: "set sample=False", "leave out --sample".
    """
    return f"{OPEN}{name}{IS}{value!r}{CLOSE}"


def in_python(name: str, value: str | None) -> str:
    """How an option is written in Python."""
    return name if value is None else f"set {name}={value}"


class Blip2Error(ValueError):
    """Invalid input. The command line prints this line without a traceback.

    The message may contain `option` and `setting`. They are written as in Python; `message_with` takes another
    spelling.
    """

    def __init__(self, message: str = "") -> None:
        self._message = message
        super().__init__(self.message_with(in_python))

    def message_with(self, spelling: Spelling) -> str:
        """The message, with its options formatted by ``spelling``."""
        return MARKED.sub(lambda found: spelling(found[1], found[2]), self._message)


class ImageError(Blip2Error):
    """An image that cannot be read."""


class ImageFormatError(ImageError):
    """Bytes that are not an image, or an unsupported format."""


class ImageSizeError(ImageError):
    """An image with more pixels than are allowed."""


class CheckpointError(Blip2Error):
    """A model that cannot be found, or whose files do not match its configuration."""


class NotFiniteError(Blip2Error):
    """NaN or infinite values in a model's computation, from damaged weights or an overflow."""


class ImageNotFiniteError(ImageError, NotFiniteError):
    """An image for which a model computes NaN or infinite values."""


class RecipeError(Blip2Error):
    """A training recipe, or its data, that is invalid."""


class OptionError(Blip2Error):
    """An option with an invalid value, or options that exclude each other."""


class IndexFileError(Blip2Error):
    """An index of images that cannot be read or written, or that belongs to another model."""


class CollectionError(Blip2Error):
    """A collection of images that cannot be read, or an output that cannot be written."""
