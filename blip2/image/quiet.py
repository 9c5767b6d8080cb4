"""Without Pillow's warnings and log while an image is read, in this thread alone.

They name no image and tell nobody what to do: whatever spoils the pixels is an error of its own. The standard
library's `catch_warnings` would silence (or undo) what other threads do at the same time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_reading: ContextVar[bool] = ContextVar("blip2 reads an image", default=False)


class _OnlyWhileReading(type):
    def __subclasscheck__(cls, category: type) -> bool:
        return type.__subclasscheck__(cls, category) or (_is_reading.get() and issubclass(category, Warning))


class _WhileReading(Warning, metaclass=_OnlyWhileReading):
    """A category of a filter: every warning is of it where an image is being read, and elsewhere none."""


def _is_told(record: logging.LogRecord) -> bool:
    return not _is_reading.get()


@contextmanager
def quiet() -> Iterator[None]:
    """No warning is shown, nor made an error, by what this thread does within."""
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[2] is not _WhileReading:  # others may have been put before it
        warnings.simplefilter("ignore", _WhileReading)
    logging.getLogger("PIL.TiffImagePlugin").addFilter(_is_told)  # the one that logs what its error says again
    before = _is_reading.set(True)
    try:
        yield
    finally:
        _is_reading.reset(before)
