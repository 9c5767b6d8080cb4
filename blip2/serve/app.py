"""The application: its routes, its doorman, and its models, which are loaded once the port is open."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware

from blip2 import __version__
from blip2.serve import openai, plain, static
from blip2.serve.doorman import Doorman
from blip2.serve.fetch import Fetcher
from blip2.serve.handlers import add_handlers
from blip2.serve.house import STATE
from blip2.serve.limits import Limits
from blip2.serve.service import Models, Service


def create_app(
    load: Callable[[], Models],
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    fetcher: Fetcher | None = None,
    replica: str | None = None,
) -> FastAPI:
    """An ASGI application. ``load`` is called in a thread when it starts.

    ``keys``: whoever has none of them is sent away; without any, everybody is let in. ``fetcher``: for pictures at
    web addresses, which by default are refused. ``replica``: its name, if it is one of several; answers and metrics
    carry it. ``app.state.service`` is its `Service`.
    """
    limits = limits or Limits()
    service = Service(load, limits, fetcher or Fetcher(), replica)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any], None]:
        service.start()
        yield {STATE: service.house}
        await service.stop()

    app = FastAPI(
        title="blip2",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy it would send clients, and their keys, to the wrong scheme and host
    )
    app.state.service = service
    add_handlers(app)
    app.include_router(openai.router(service))
    app.include_router(plain.router(service))
    app.include_router(static.router())

    @app.get("/health")
    async def health() -> Response:
        """Whether the server is there at all, also while the model is loading; 503 if it has to be started anew."""
        if service.death is not None and (refusal := service.refusal()) is not None:
            return refusal.response()
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether it can answer; 503 while the model is loading, and if it is gone."""
        refusal = service.refusal()
        return JSONResponse({"status": "ready"}) if refusal is None else refusal.response()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    routes = [path for path in app.openapi()["paths"] if "{" not in path]
    app.user_middleware.append(
        Middleware(
            Doorman,
            limits=limits,
            metrics=service.metrics,
            keys=keys,
            refusal=service.refusal,
            routes=routes,
            replica=replica,
            places=service.places,
            bodies=service.bodies,
        )
    )
    return app
