"""Suppresses Pillow's warnings and log messages while an image is read, only in this thread.

They name no image and no remedy, and anything that damages the pixels is an error anyway. The standard library's
`catch_warnings` would also affect other threads.
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
    """A warning category that matches every warning while an image is read in this thread, and else none."""


def _is_logged(record: logging.LogRecord) -> bool:
    return not _is_reading.get()


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, warnings of this thread are neither shown nor raised."""
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[2] is not _WhileReading:  # another filter may have been inserted before it
        warnings.simplefilter("ignore", _WhileReading)
    logging.getLogger("PIL.TiffImagePlugin").addFilter(_is_logged)  # the only logger that repeats its error's message
    before = _is_reading.set(True)
    try:
        yield
    finally:
        _is_reading.reset(before)
