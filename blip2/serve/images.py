"""Images in requests: a data URL, plain base64, or the URL of an image file."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

from blip2.errors import ImageError
from blip2.serve.errors import ApiError

WHITE_SPACE = b" \t\r\n\f\v"
DATA_ADDRESS = re.compile(r"data:[\w/+.-]{0,100};base64,", re.IGNORECASE)

ImageSource = str | bytes
"""A URL, or the bytes of an image file."""


def parse_source(source: str, where: str = "") -> ImageSource:
    """``where``: the field that holds it, if a request may have several. Raises ImageError."""
    if source[:8].lower().startswith(("http:", "https:")):
        return source
    try:
        return decoded(source)
    except ImageError as error:
        raise ImageError(f"{where}: {error}" if where else str(error)) from None


def decoded(source: str) -> bytes:
    """The bytes of a data URL or of plain base64. Raises ImageError for anything else, such as a path."""
    header, comma, payload = source.partition(",") if source[:5].lower() == "data:" else ("", "", source)
    if header and not (comma and header.lower().endswith(";base64")):
        raise ImageError("data URL: does not begin with 'data:image/...;base64,'")
    try:
        packed = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        content = base64.b64decode(packed.translate(None, WHITE_SPACE), validate=True)
    except ValueError:
        raise ImageError(
            f"the {'data' if header else 'image'} is not valid base64; send data:image/...;base64, and the "
            "image file in base64"
        ) from None
    if not content:
        raise ImageError("the image is empty; send an image file in base64")
    return content


def check_no_image(text: str, where: str, remedy: str) -> None:
    """Raises ApiError for an image where a text belongs: a model would read its base64 as text."""
    if DATA_ADDRESS.search(text):
        raise ApiError(400, "image_in_text", f"{where}: an image stands where a text belongs; {remedy}", param=where)
