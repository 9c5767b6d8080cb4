"""FastAPI's error handlers: every error response has the form of `ApiError`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from blip2.errors import Blip2Error
from blip2.serve.complaints import of_validation
from blip2.serve.dialect import other_path
from blip2.serve.errors import ApiError, as_api_error


def add_handlers(app: FastAPI) -> None:
    async def respond(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def failed(request: Request, error: Exception) -> JSONResponse:
        response = as_api_error(error).response()
        response.headers["connection"] = "close"  # uvicorn closes the connection after this error; announce it
        return response

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors()).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        headers = dict(error.headers) if error.headers else None
        message = other_path(request.url.path) if error.status_code == 404 else str(error.detail)
        return ApiError(error.status_code, code, message, headers=headers).response()

    app.add_exception_handler(ApiError, respond)
    app.add_exception_handler(Blip2Error, respond)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)
