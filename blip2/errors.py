"""Errors for people: one line that says what was wrong, with which file or value, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

# Control characters that were made to switch to another character set and back; nobody writes them.
OPEN, CLOSE, IS = "\x0e", "\x0f", "\x1f"
MARKED = re.compile(rf"{OPEN}([^{IS}{CLOSE}]*)(?:{IS}([^{CLOSE}]*))?{CLOSE}")

Spelling = Callable[[str, str | None], str]
"""From the name of an option, and the value that it should be set to (if it should), to the words of a front door."""


def option(name: str) -> str:
    """The name of an option within a message; the command line writes its flag: num_beams, --beams."""
    return f"{OPEN}{name}{CLOSE}"


def setting(name: str, value: object) -> str:
    """What to do about an option, within a message: "set num_beams=1", "give --beams 1".

    What False or None stands for is no flag at all: "set sample=False", "leave out --sample".
    """
    return f"{OPEN}{name}{IS}{value!r}{CLOSE}"


def in_python(name: str, value: str | None) -> str:
    """How the interface for Python writes an option."""
    return name if value is None else f"set {name}={value}"


class Blip2Error(ValueError):
    """What was given cannot be used; the command line prints this line and no traceback.

    The message may hold `option` and `setting`, which are written as in Python unless `told` is asked otherwise.
    """

    def __init__(self, message: str = "") -> None:
        self._message = message
        super().__init__(self.told(in_python))

    def told(self, spelling: Spelling) -> str:
        """The message, with the options in the words of a front door."""
        return MARKED.sub(lambda found: spelling(found[1], found[2]), self._message)


class ImageError(Blip2Error):
    """A picture that cannot be read."""


class ImageFormatError(ImageError):
    """Bytes that are no picture, or one of a format that is not read."""


class ImageSizeError(ImageError):
    """A picture with more pixels than are allowed."""


class CheckpointError(Blip2Error):
    """A model that cannot be found, or whose files do not hold what its configuration promises."""


class NotFiniteError(Blip2Error):
    """Numbers that are NaN or infinite where a model computes: damaged weights, or an overflow."""


class ImageNotFiniteError(ImageError, NotFiniteError):
    """A picture of which a model computes what is NaN or infinite."""


class RecipeError(Blip2Error):
    """A training recipe or its data that cannot be carried out."""


class OptionError(Blip2Error):
    """An option outside what it may be, or options that exclude each other."""


class IndexFileError(Blip2Error):
    """An index of pictures that cannot be read or written, or that another model made."""


class CollectionError(Blip2Error):
    """A collection of pictures that cannot be read, or an output of it that cannot be written."""
