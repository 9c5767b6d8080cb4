"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blip2.errors import Blip2Error, CheckpointError, ImageError, ImageFormatError, ImageSizeError, NotFiniteError

if TYPE_CHECKING:
    from starlette.responses import JSONResponse

logger = logging.getLogger("blip2.serve")

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


FIELDS = {"num_return": "n", "sample": "temperature", "max_new_tokens": "max_tokens"}
"""Field names for options of the Python API; most are the same."""


def in_fields(name: str, value: str | None, called: Mapping[str, str] = {}) -> str:
    """An option in a message as a field of the request, see `Blip2Error.message_with`. ``called``: the caller's
    names."""
    field = FIELDS.get(name, name)
    field = called.get(field, field)
    if value is None:
        return field
    if value in ("False", "None"):
        return f"leave out {field}"
    return f"give a {field} above 0" if value == "True" else f"set {field} to {value}"


class ApiError(Exception):
    """An error response: HTTP status, a code for programs, one line for people."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # What a client sent may contain lone surrogates, which a response cannot encode.
        message, param = (text and text.encode("utf-8", "replace").decode() for text in (self.message, self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        from starlette.responses import JSONResponse  # the reader processes do not need it

        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """The response for any error. Unexpected errors are logged here, and not shown to the client."""
    match error:
        case ApiError():
            return error
        case NotFiniteError():  # a defect of the model, which the operator has to know
            logger.error("a request failed: %s", error)
            return ApiError(500, "not_finite", str(error))
        case ImageSizeError():
            return ApiError(413, "image_too_large", str(error), param="image")
        case ImageFormatError():
            return ApiError(415, "unsupported_image", str(error), param="image")
        case ImageError():
            return ApiError(400, "invalid_image", str(error), param="image")
        case Blip2Error() if not isinstance(error, CheckpointError):
            return ApiError(400, "invalid_value", error.message_with(in_fields))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal_error", "internal error; see the server's log")
