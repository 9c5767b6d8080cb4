"""Parsing of forms: their fields, and the file of an image."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from blip2.serve.errors import ApiError

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs a warning for each invalid form

MAX_FORM_FIELDS, MAX_FORM_TEXT_BYTES = 400, 2**20

Part = tuple[str, str | bytes]
"""A name, and a text or the bytes of a file."""


def encoded(content: bytes) -> list[Part]:
    """The parts of application/x-www-form-urlencoded. Raises ApiError."""
    if content.count(b"&") >= MAX_FORM_FIELDS:
        raise _bad(f"it has more than {MAX_FORM_FIELDS} fields")
    try:
        found = parse_qsl(content.decode("utf-8"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise _bad("a text in it is not UTF-8") from None
    # Hand-made forms often contain the plus signs of base64 unescaped; they decode to spaces, which base64 has not.
    return [(name, value.replace(" ", "+") if name == "image" else value) for name, value in found]


def fields_of(
    parts: Iterable[Part], names: Collection[str], lists: Collection[str]
) -> tuple[dict[str, Any], bytes | None]:
    """The fields, and the image if it came as a file. ``names``: known fields. ``lists``: fields that may be repeated;
    a single one is a text. Raises ApiError."""
    image: bytes | None = None
    given: dict[str, Any] = {}
    for name, value in parts:
        if isinstance(value, bytes):
            if name != "image":
                message = f"the file's field is {name[:40]!r}; name it 'image'"
                if name in names:
                    message = f"{name} was sent as a file; send it as a text (curl: -F '{name}=<FILE')"
                raise ApiError(400, "invalid_value", message, param=name[:40])
            image, value = value, "file"
            if name in given:
                raise _bad("it has more than one image")
        if name not in given:
            given[name] = value
        elif name in lists:
            given[name] = [*given[name], value] if isinstance(given[name], list) else [given[name], value]
        else:
            raise _bad(f"{name[:40]!r} occurs more than once; send it once")
    return given, image


def parts_of(content: bytes, content_type: str) -> Iterator[Part]:
    """The parts of multipart/form-data. Raises ApiError."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise _bad("its Content-Type names no boundary; let the client set that header")
    parts: list[tuple[dict[bytes, bytes], bytearray]] = []
    header: list[bytearray] = []
    is_whole = False

    def begin() -> None:
        if len(parts) >= MAX_FORM_FIELDS:
            raise _bad(f"it has more than {MAX_FORM_FIELDS} fields")
        parts.append(({}, bytearray()))
        header[:] = bytearray(), bytearray()

    def end_of_header() -> None:
        parts[-1][0][bytes(header[0]).lower()] = bytes(header[1])
        header[:] = bytearray(), bytearray()

    def end() -> None:
        nonlocal is_whole
        is_whole = True

    callbacks: Any = {
        "on_part_begin": begin,
        "on_part_data": lambda data, start, stop: parts[-1][1].extend(data[start:stop]),
        "on_header_field": lambda data, start, stop: header[0].extend(data[start:stop]),
        "on_header_value": lambda data, start, stop: header[1].extend(data[start:stop]),
        "on_header_end": end_of_header,
        "on_end": end,
    }
    try:
        MultipartParser(boundary, callbacks).write(content)
    except FormParserError:
        raise _bad("its parts do not match the boundary in its Content-Type; let the client set that header") from None
    if not is_whole:
        raise _bad("its end is missing; send all of it")
    for headers, data in parts:
        _, named = parse_options_header(headers.get(b"content-disposition", b""))
        try:
            name = named[b"name"].decode("utf-8")
            if b"filename" in named:
                yield name, bytes(data)
                continue
            if len(data) > MAX_FORM_TEXT_BYTES:
                raise _bad(f"the field {name[:40]!r} has more than {MAX_FORM_TEXT_BYTES:,} bytes")
            yield name, data.decode("utf-8")
        except KeyError:
            raise _bad("a part of it has no name") from None
        except UnicodeDecodeError:
            raise _bad("a text in it is not UTF-8") from None


def _bad(reason: str) -> ApiError:
    return ApiError(400, "invalid_form", f"the form cannot be read: {reason}")
