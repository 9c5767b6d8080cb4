"""The web page at ``/`` and its files: read once, with ETags of their content and a strict content security policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from blip2.serve.errors import ApiError

PAGE = Path(__file__).parent / "page"
# Not from `mimetypes`, which depends on the machine: browsers do not run a module with a wrong type.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
"""The page may only run and contact this server."""


@dataclass(frozen=True)
class File:
    content: bytes
    headers: dict[str, str]


def files_of(folder: Path) -> dict[str, File]:
    """The files that can be requested, by name: those with a type listed above."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            headers = {
                "Content-Type": TYPES[path.suffix],
                "Content-Security-Policy": CONTENT_SECURITY_POLICY,
                "Cache-Control": "no-cache",  # may be cached, but has to be revalidated
                "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            }
            found[path.name] = File(content, headers)
    return found


PATHS = {"/": ["get"], "/page/{name}": ["get"]}
"""For browsers, so not in /openapi.json."""


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    files = files_of(PAGE)

    @routes.get("/")
    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @routes.get("/page/{name}")
    async def page_file(request: Request, name: str) -> Response:
        if name not in files:
            raise ApiError(404, "not_found", "there is no such file")
        return _answer(request, files[name])

    return routes


def _answer(request: Request, file: File) -> Response:
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.headers["ETag"] in known:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)
