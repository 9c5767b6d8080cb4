"""The columns of rows: which one holds the image and which one the text, and how their values are read."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence

from blip2.collection.sources.tables import Table
from blip2.data.foreign import CAPTIONS, IMAGES
from blip2.errors import CollectionError, ImageError, option
from blip2.image import name_of
from blip2.image.sources import stream_of

IMAGE_COLUMNS = ("image", *IMAGES, "jpg", "jpeg", "png", "webp")
TARGET_COLUMNS = ("label", "output")
"""Columns with texts to learn, which are seldom captions of the image."""
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", *(name for name in CAPTIONS if name not in TARGET_COLUMNS))


def is_known_image(name: str) -> bool:
    return name.strip().lower() in IMAGE_COLUMNS


def image_column_of(tables: Sequence[Table], wanted: str | None) -> str:
    first = tables[0]
    if wanted is None:
        wanted = _found(first.holding_bytes, IMAGE_COLUMNS) or _found(first.columns, IMAGE_COLUMNS)
    if wanted is None and len(first.holding_bytes) == 1:
        [wanted] = first.holding_bytes
    if wanted is None and not first.columns and (broken := next((row for row in first.rows() if row.problem), None)):
        raise CollectionError(f"{broken.name}: {broken.problem}")
    if wanted is None:
        raise CollectionError(
            f"{first.path}: no column ({', '.join(map(repr, first.columns)) or 'there are none'}) is known "
            f"to hold images; name the one that does with {option('image_column')}"
        )
    for table in tables:
        if wanted not in table.columns:
            raise CollectionError(f"{table.path}: has no column {wanted!r}, but {', '.join(map(repr, table.columns))}")
    return wanted


def caption_column_of(tables: Sequence[Table], wanted: str | None, image_column: str) -> str:
    columns = [name for table in tables for name in table.columns if name != image_column]
    if wanted is not None and wanted not in columns:
        raise CollectionError(f"{tables[0].path}: has no column {wanted!r}, but {', '.join(map(repr, columns))}")
    return wanted or _found(columns, CAPTION_COLUMNS) or ""


def _found(columns: Sequence[str], known: Sequence[str]) -> str | None:
    lowered = {name.strip().lower(): name for name in reversed(columns)}
    return next((lowered[name] for name in known if name in lowered), None)


def image_of(value: object, column: str) -> tuple[str | bytes | None, str]:
    """The path, URL or bytes of an image, and the problem if there is none."""
    if isinstance(value, dict):  # images as `datasets` writes them; in JSON as base64
        content = value.get("bytes")
        if isinstance(content, str):
            try:
                content = base64.b64decode(content, validate=True)
            except ValueError:
                return None, f"the bytes in {column!r} are not base64"
        value = value.get("path") if content is None else content
    match value:
        case bytes() if value:
            return value, ""
        case str() if value[:5].lower() == "data:":
            try:
                return stream_of(value, "", 0, 0).read(), ""
            except ImageError as error:
                return None, str(error)
        case str() if value and not value.isspace():
            if "\0" in value or not _is_name(value):
                return None, f"{value!r} is not a file name"
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value) and not is_address(value):
                return None, f"{name_of(value)}: only http and https URLs are read; download it first"
            return value, ""
        case None | "" | b"" | str():
            return None, f"there is no image in {column!r}"
    return None, f"{column!r} holds {type(value).__name__}, not an image"


def label_of(value: object) -> str | None:
    """The name that a row gives its image; None if it has none, or holds the image itself."""
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value.strip() or value[:5].lower() == "data:":
        return None
    return value


def text_of(value: object) -> tuple[str, str]:
    """The caption of an image, the first of several; and the problem if it cannot be read."""
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict):
        value = value.get("raw", "")
    if not isinstance(value, str):
        return "", ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return "", f"its text has lone surrogates, {value!r}; write it as Unicode"
    return " ".join(value.split()), ""


def is_address(image: str) -> bool:
    return bool(re.match("https?://", image, re.IGNORECASE))


def _is_name(value: str) -> bool:
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True
