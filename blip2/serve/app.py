"""The application: its routes, its admission, and its models, which are loaded after the port is opened."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from blip2 import __version__
from blip2.serve import openai, plain, static
from blip2.serve.admission import Admission
from blip2.serve.bodies import Bodies
from blip2.serve.connections import STATE, Connections
from blip2.serve.errors import ApiError
from blip2.serve.fetch import Fetcher
from blip2.serve.gate import Gate
from blip2.serve.handlers import add_handlers
from blip2.serve.hosts import Door
from blip2.serve.limits import Limits
from blip2.serve.loading import Loading
from blip2.serve.log import Failures, RequestLog
from blip2.serve.metrics import Metrics
from blip2.serve.places import Places
from blip2.serve.routes import Routes
from blip2.serve.service import Models, Service


def create_app(
    load: Callable[[], Models],
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    door: Door | None = None,
    fetcher: Fetcher | None = None,
    replica: str | None = None,
    loading: Loading | None = None,
) -> FastAPI:
    """An ASGI application. ``load`` is called in a thread on start-up; requests are told what it notes in ``loading``.

    ``keys``: accepted API keys; without any, no key is needed. ``door``: allowed host names (default: any), allowed
    origins of web pages (default: none), and the path prefix of a proxy. ``fetcher``: downloads images at URLs, which
    are refused by default. ``replica``: the name of this replica, if there are several; answers and metrics carry it.
    ``app.state.service`` is the `Service`.
    """
    service = Service(load, limits or Limits(), fetcher or Fetcher(), replica, loading)
    routers = [openai.router(service), plain.router(service)]
    return application(service, routers, keys=keys, door=door, replica=replica)


class Answering(Protocol):
    """What the application needs of the `Service` behind it."""

    limits: Limits
    metrics: Metrics
    connections: Connections
    places: Places
    bodies: Bodies

    @property
    def death(self) -> BaseException | None: ...

    def start(self) -> None: ...

    async def stop(self) -> None: ...

    def refusal(self) -> ApiError | None: ...

    async def numbers(self) -> bytes: ...


def application(
    service: Answering,
    routers: Sequence[APIRouter],
    *,
    keys: Sequence[str] = (),
    door: Door | None = None,
    replica: str | None = None,
) -> FastAPI:
    """The routes that need a model, the web page, the endpoints for operators, and all middleware."""
    door = door or Door()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, Any], None]:
        service.start()
        yield {STATE: service.connections}
        await service.stop()

    app = FastAPI(
        title="blip2",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        servers=[{"url": door.root_path}] if door.root_path else None,
        redirect_slashes=False,  # behind a proxy, redirects would name the wrong scheme and host
    )
    app.state.service = service
    add_handlers(app)
    for router in routers:
        app.include_router(router)
    app.include_router(static.router())

    @app.get("/health")
    async def health() -> Response:
        """Liveness: 200 also while the model is loading; 503 if the server has to be restarted."""
        if service.death is not None and (refusal := service.refusal()) is not None:
            return refusal.response()
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Readiness: 503 while the model is loading, and after it has failed."""
        refusal = service.refusal()
        return JSONResponse({"status": "ready"}) if refusal is None else refusal.response()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.numbers(), media_type=CONTENT_TYPE_LATEST)

    app.user_middleware.append(
        Middleware(
            guarded,
            door=door,
            routes=routes_of(app),
            keys=keys,
            limits=service.limits,
            metrics=service.metrics,
            refusal=service.refusal,
            replica=replica,
            places=service.places,
            bodies=service.bodies,
        )
    )
    return app


def routes_of(app: FastAPI) -> Routes:
    """All routes of an application."""
    return Routes({**app.openapi()["paths"], **static.PATHS, "/openapi.json": ["get"]})


def guarded(app: ASGIApp, /, *, door: Door, routes: Routes, keys: Sequence[str], **of_admission: Any) -> ASGIApp:
    """An application within its middleware, from the outside in: access log, allowed hosts and origins, the `Admission`
    with keys and queue, and the handler of unexpected errors."""
    admission = Admission(Failures(app), keys=keys, routes=routes.fixed, **of_admission)
    return RequestLog(Gate(admission, door=door, routes=routes, has_keys=bool(keys)), routes=routes)
