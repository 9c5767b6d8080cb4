"""What a request's body says: the bytes that a stranger sent -> checked fields, and pictures.

All of this happens in a process of its own, see `reader`; so nothing here needs torch, and nothing here has to be quick
whatever the bytes are. What is given back is small but for the pictures.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from blip2.errors import ImageError
from blip2.serve import conversation
from blip2.serve.errors import ApiError, of_validation
from blip2.serve.limits import Limits
from blip2.serve.schemas import (
    AskRequest,
    CaptionRequest,
    ChatRequest,
    EmbeddingImage,
    EmbeddingsRequest,
    ExplainRequest,
    MatchRequest,
)

SCHEMAS: dict[str, type[BaseModel]] = {
    "/caption": CaptionRequest,
    "/ask": AskRequest,
    "/match": MatchRequest,
    "/explain": ExplainRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingsRequest,
}
TEXTS = ("prompt", "question", "text", "answer", "word", "caption")
"""Fields of the plain routes that are texts."""
LISTS = ("texts", "stop")
"""Fields of a form that may be given several times."""
MAX_FORM_FIELDS, MAX_FORM_TEXT_BYTES = 400, 2**20
MAX_VALUES = 500_000
"""Brackets and commas of a JSON body: each value takes a hundred bytes of memory, and two of the body."""
WHITE_SPACE = b" \t\r\n\f\v"
CHARACTERS_PER_TOKEN = 16
"""Of a text, no more are even looked at."""
CHARACTERS_PER_TEXT = 1024
"""On average, where many are sent."""


@dataclass(frozen=True)
class Body:
    """``fields``: those of the route's schema but for messages and pictures, see `read`. ``pictures``: each a web
    address, or the bytes of an image file."""

    fields: dict[str, Any]
    pictures: list[str | bytes]


def read(route: str, content_type: str, content: bytes, limits: Limits) -> Body:
    """What was sent to a route. Raises ApiError, ImageError, OptionError; what was sent is not repeated in them.

    In place of ``messages``, /v1/chat/completions has ``history`` (questions with their answers) and ``question``. In
    the ``input`` of /v1/embeddings None stands for the next picture.
    """
    given, file = _given(content_type, content, is_form_allowed=not route.startswith("/v1/"))
    try:
        body = SCHEMAS[route].model_validate(given)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_input=False, include_context=False)) from None
    del given
    match body:
        case ChatRequest():
            return _chat(body, limits)
        case EmbeddingsRequest():
            return _embeddings(body, limits)
    fields = body.model_dump(exclude={"image"})
    for name in TEXTS:
        checked_text(fields.get(name) or "", limits)
    _check_texts(fields.get("texts") or [], limits, "texts", "compared")
    return Body(fields, [_picture(body.image) if file is None else file])  # type: ignore[attr-defined]


def _chat(body: ChatRequest, limits: Limits) -> Body:
    asked = conversation.read(body.messages, limits.max_images)
    checked_text(asked.question + "".join(f"{question} {said}" for question, said in asked.history), limits)
    fields = body.model_dump(exclude={"messages"})
    return Body({**fields, "history": asked.history, "question": asked.question}, [_picture(asked.image)])


def _embeddings(body: EmbeddingsRequest, limits: Limits) -> Body:
    items = body.input if isinstance(body.input, list) else [body.input]
    images = [item.image for item in items if isinstance(item, EmbeddingImage)]
    if len(images) > limits.max_images:
        raise ApiError(400, "too_many_images", f"{len(images)} pictures; at most {limits.max_images}")
    _check_texts([item for item in items if isinstance(item, str)], limits, "input", "read")
    fields = body.model_dump(exclude={"input"})
    return Body(
        {**fields, "input": [item if isinstance(item, str) else None for item in items]}, list(map(_picture, images))
    )


def checked_text(text: str, limits: Limits) -> str:
    """The text, if it is short enough to be worth reading at all."""
    if len(text) > CHARACTERS_PER_TOKEN * limits.max_prompt_tokens:
        raise too_long(f"{len(text)} characters", limits)
    return text


def too_long(size: str, limits: Limits) -> ApiError:
    message = f"the text has {size}; at most {limits.max_prompt_tokens} tokens are read; shorten it"
    return ApiError(400, "prompt_too_long", message)


def _check_texts(texts: list[str], limits: Limits, field: str, done: str) -> None:
    if len(texts) > limits.max_texts:
        message = f"{len(texts)} texts; at most {limits.max_texts} are {done}"
        raise ApiError(400, "too_many_texts", message, param=field)
    for text in texts:
        checked_text(text, limits)
    length, most = sum(map(len, texts)), CHARACTERS_PER_TEXT * limits.max_texts
    if length > most:
        message = f"the texts have {length:,} characters in all; at most {most:,} are {done} at a time; send fewer"
        raise ApiError(400, "prompt_too_long", message, param=field)


# ---- from bytes to fields -----------------------------------------------------------------------------


def _given(content_type: str, content: bytes, *, is_form_allowed: bool) -> tuple[Any, bytes | None]:
    """The fields, not checked yet, and the file of a form."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind in ("application/json", "") or not is_form_allowed:
        return _json(content), None
    if kind == "multipart/form-data":
        return _fields(_parts(content, content_type))
    if kind == "application/x-www-form-urlencoded":
        return _fields((name, value, False) for name, value in _encoded(content))
    raise ApiError(415, "unsupported_media_type", "send multipart/form-data with a file, or application/json")


def _json(content: bytes) -> Any:
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ApiError(400, "too_many_values", f"the JSON has more than {MAX_VALUES:,} values; send less at a time")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ApiError(400, "invalid_json", f"the body is no valid JSON: {reason}") from None


def _encoded(content: bytes) -> list[tuple[str, str]]:
    if content.count(b"&") >= MAX_FORM_FIELDS:
        raise _bad_form(f"it has more than {MAX_FORM_FIELDS} fields")
    try:
        return parse_qsl(content.decode("utf-8"), keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise _bad_form(str(error)) from None


def _fields(parts: Iterable[tuple[str, str | bytes, bool]]) -> tuple[dict[str, Any], bytes | None]:
    image: bytes | None = None
    given: dict[str, Any] = {}
    for name, value, is_file in parts:
        if is_file:
            assert isinstance(value, bytes)
            if name != "image":
                raise ApiError(400, "invalid_value", f"the file is called {name[:40]!r}; call it 'image'")
            if image is not None:
                raise _bad_form("it has more than one file")
            image = value
            given["image"] = "file"
        elif name in LISTS:
            given.setdefault(name, []).append(value)
        elif name != "image" or image is None:
            given[name] = value
    return given, image


def _parts(content: bytes, content_type: str) -> Iterator[tuple[str, str | bytes, bool]]:
    """The name of each part of a form, its text or the bytes of its file, and whether it is a file."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise _bad_form("its Content-Type names no boundary")
    parts: list[tuple[dict[bytes, bytes], bytearray]] = []
    header: list[bytearray] = []
    is_whole = False

    def begin() -> None:
        if len(parts) >= MAX_FORM_FIELDS:
            raise _bad_form(f"it has more than {MAX_FORM_FIELDS} fields")
        parts.append(({}, bytearray()))
        header[:] = bytearray(), bytearray()

    def end_of_header() -> None:
        parts[-1][0][bytes(header[0]).lower()] = bytes(header[1])
        header[:] = bytearray(), bytearray()

    def end() -> None:
        nonlocal is_whole
        is_whole = True

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin,
            "on_part_data": lambda data, start, stop: parts[-1][1].extend(data[start:stop]),
            "on_header_field": lambda data, start, stop: header[0].extend(data[start:stop]),
            "on_header_value": lambda data, start, stop: header[1].extend(data[start:stop]),
            "on_header_end": end_of_header,
            "on_end": end,
        },
    )
    try:
        parser.write(content)
    except FormParserError as error:
        raise _bad_form(str(error)) from None
    if not is_whole:
        raise _bad_form("its end is missing; send all of it")
    for headers, data in parts:
        _, named = parse_options_header(headers.get(b"content-disposition", b""))
        try:
            name = named[b"name"].decode("utf-8")
            if b"filename" in named:
                yield name, bytes(data), True
                continue
            if len(data) > MAX_FORM_TEXT_BYTES:
                raise _bad_form(f"the field {name[:40]!r} has more than {MAX_FORM_TEXT_BYTES:,} bytes")
            yield name, data.decode("utf-8"), False
        except KeyError:
            raise _bad_form("a part of it has no name") from None
        except UnicodeDecodeError:
            raise _bad_form("a text in it is not UTF-8") from None


def _bad_form(reason: str) -> ApiError:
    return ApiError(400, "invalid_form", f"the form cannot be read: {reason}")


# ---- pictures ----------------------------------------------------------------------------------------------


def _picture(source: str) -> str | bytes:
    return source if source[:8].lower().startswith(("http:", "https:")) else decoded(source)


def decoded(source: str) -> bytes:
    """The bytes in a data address or in plain base64. Raises ImageError; a path or another address is neither."""
    header, comma, payload = source.partition(",") if source[:5].lower() == "data:" else ("", "", source)
    if header and not (comma and header.lower().endswith(";base64")):
        raise ImageError("data address: does not begin with 'data:image/...;base64,'; encode it so")
    try:
        packed = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        content = base64.b64decode(packed.translate(None, WHITE_SPACE), validate=True)
    except ValueError:
        raise ImageError(
            f"the {'data' if header else 'picture'} is not valid base64; send data:image/...;base64, and the bytes "
            "of the image file in base64"
        ) from None
    if not content:
        raise ImageError("the picture is empty; send the bytes of an image file in base64")
    return content
