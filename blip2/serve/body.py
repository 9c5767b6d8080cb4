"""Parsing of request bodies: untrusted bytes to checked fields and images.

This runs in a separate process, see `reader`. So it needs no torch, and slow input does not block the server. The
result is small except for the images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from blip2.serve import conversation, dialect, forms
from blip2.serve.complaints import of_validation
from blip2.serve.errors import ApiError
from blip2.serve.images import ImageSource, check_no_image, parse_source
from blip2.serve.limits import Limits
from blip2.serve.schemas import SCHEMAS, ChatRequest, Decoding, EmbeddingImage, EmbeddingsRequest
from blip2.text import clean

TEXTS = ("prompt", "question", "text", "answer", "word", "caption")
"""Text fields of the plain routes."""
LISTS = {"texts": "compared", "choices": "compared"}
"""Fields of the plain routes that are lists of texts, and the verb for messages about them."""
MAX_VALUES = 500_000
"""Maximum brackets and commas of a JSON body: each value takes 100 bytes of memory, but two bytes of the body."""
CHARACTERS_PER_TOKEN = 16
"""Maximum characters of a text per token; longer texts are refused unread."""
CHARACTERS_PER_TEXT = 1024
"""Maximum average characters per text, where many are sent."""
IMAGE_FILES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""First bytes of image files, to recognise an image sent as the whole body."""
AS_IMAGE = "send it in the field 'image'"
AS_INPUT = 'send it as {"image": "data:image/...;base64,..."} instead'


@dataclass(frozen=True)
class Body:
    """``fields``: those of the route's schema except messages and images, see `read`. ``images``: each a URL, or the
    bytes of an image file."""

    fields: dict[str, Any]
    images: list[ImageSource]


def read(route: str, content_type: str, content: bytes, limits: Limits) -> Body:
    """Parse the body for a route. Raises ApiError, ImageError, OptionError; their messages do not repeat the content.

    Instead of ``messages``, /v1/chat/completions has ``history`` (questions with answers) and ``question``. In
    ``input`` of /v1/embeddings, None stands for the next image. Both have ``ignored``: fields that were ignored.
    """
    given, file = _given(route, content_type, content)
    parsed = dialect.parse_fields(given, route)
    del given
    try:
        body = SCHEMAS[route].model_validate(parsed.fields)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_input=False), parsed.called) from None
    if isinstance(body, Decoding):
        body.called = parsed.called
    match body:
        case ChatRequest():
            return _chat(body, parsed.ignored, limits)
        case EmbeddingsRequest():
            return _embeddings(body, parsed.ignored, limits)
    fields = body.model_dump(exclude={"image"})
    for name in TEXTS:
        if fields.get(name):
            _check_text(fields[name], name, AS_IMAGE, limits)
    for name, done in LISTS.items():
        name_there = parsed.called.get(name, name)
        texts = {f"{name_there}[{place}]": text for place, text in enumerate(fields.get(name) or [])}
        _check_texts(texts, limits, name_there, done, AS_IMAGE)
    return Body(fields, [parse_source(body.image) if file is None else file])  # type: ignore[attr-defined]


def _chat(body: ChatRequest, ignored: list[str], limits: Limits) -> Body:
    asked = conversation.read(body.messages, limits)
    checked_text(asked.question + "".join(f"{question} {answer}" for question, answer in asked.history), limits)
    fields = body.model_dump(exclude={"messages"})
    extra = {"history": asked.history, "question": asked.question, "ignored": asked.ignored + ignored}
    return Body({**fields, **extra}, [asked.image])


def _embeddings(body: EmbeddingsRequest, ignored: list[str], limits: Limits) -> Body:
    items = body.input if isinstance(body.input, list) else [body.input]
    images = [item.image for item in items if isinstance(item, EmbeddingImage)]
    if len(images) > limits.max_images:
        raise ApiError(400, "too_many_images", f"{len(images)} images; at most {limits.max_images}")
    places = [f"input[{place}]" for place in range(len(items))] if isinstance(body.input, list) else ["input"]
    texts = {place: item for place, item in zip(places, items, strict=True) if isinstance(item, str)}
    _check_texts(texts, limits, "input", "read", AS_INPUT)
    fields = body.model_dump(exclude={"input"})
    extra = {"input": [item if isinstance(item, str) else None for item in items], "ignored": ignored}
    of_images = (f"{place}.image" for place, item in zip(places, items, strict=True) if not isinstance(item, str))
    return Body({**fields, **extra}, list(map(parse_source, images, of_images)))


def checked_text(text: str, limits: Limits, where: str | None = None) -> str:
    """The text, if it is short enough to be parsed at all."""
    if len(text) > CHARACTERS_PER_TOKEN * limits.max_prompt_tokens:
        raise too_long(f"{len(text)} characters", limits, where)
    return text


def too_long(size: str, limits: Limits, where: str | None = None) -> ApiError:
    """``where``: the name of the text's field, if any."""
    message = f"{where or 'the text'} has {size}; the limit is {limits.max_prompt_tokens} tokens; shorten it"
    return ApiError(400, "prompt_too_long", message, param=where)


def _check_text(text: str, where: str, as_image: str, limits: Limits) -> None:
    if not clean(text):
        raise ApiError(400, "invalid_value", f"{where}: it is empty; write something, or leave it out", param=where)
    check_no_image(text, where, as_image)
    checked_text(text, limits, where)


def _check_texts(texts: dict[str, str], limits: Limits, field: str, done: str, as_image: str) -> None:
    """``texts``: by their field paths."""
    if len(texts) > limits.max_texts:
        message = f"{len(texts)} texts; at most {limits.max_texts} are {done}"
        raise ApiError(400, "too_many_texts", message, param=field)
    for where, text in texts.items():
        _check_text(text, where, as_image, limits)
    length, most = sum(map(len, texts.values())), CHARACTERS_PER_TEXT * limits.max_texts
    if length > most:
        message = f"the texts have {length:,} characters in all; at most {most:,} are {done} per request; send fewer"
        raise ApiError(400, "prompt_too_long", message, param=field)


# ---- bytes to fields -----------------------------------------------------------------------------


def _given(route: str, content_type: str, content: bytes) -> tuple[Any, bytes | None]:
    """The unchecked fields, and the file of a form.

    The body is parsed as JSON if the Content-Type says so, or if it looks like JSON, since many clients send another
    type (curl -d claims a form).
    """
    kind = content_type.partition(";")[0].strip().lower()
    is_plain = not route.startswith("/v1/")
    if kind in ("application/json", "text/json") or kind.endswith("+json"):
        return _json(content, route), None
    if kind == "multipart/form-data" and is_plain:
        return _form(forms.parts_of(content, content_type), route)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return _json(content, route), None
    if kind == "application/x-www-form-urlencoded" and is_plain and not content.startswith(IMAGE_FILES):
        return _form(forms.encoded(content), route)
    what = "empty" if not content else "an image by itself" if content.startswith(IMAGE_FILES) else "not JSON"
    if content and kind and what == "not JSON":
        what = f"{kind[:60]}, not JSON"
    raise ApiError(415, "unsupported_media_type", f"the body is {what}; {dialect.hint_for_body(route)}")


def _form(parts: Any, route: str) -> tuple[Any, bytes | None]:
    names = dialect.NAMES[route]
    return forms.fields_of(parts, names, [name for name, own in names.items() if own in dialect.LISTS])


def _json(content: bytes, route: str) -> Any:
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ApiError(400, "too_many_values", f"the JSON has more than {MAX_VALUES:,} values; send fewer")
    if not content.strip():
        raise ApiError(400, "invalid_json", f"the body is empty; {dialect.hint_for_body(route)}")
    try:
        return json.loads(content, object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a repeated name, since either value could be meant."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} occurs twice; send it once")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
