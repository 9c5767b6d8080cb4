"""Runs an application until a stop signal; what is being answered then is finished."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from blip2.errors import OptionError
from blip2.serve.connection import Connection
from blip2.serve.service import Service

MAX_CONNECTIONS = 1024
LOOPBACK = ("127.0.0.1", "::1")


def listen(host: str, port: int) -> socket.socket:
    """An open port; 0 is any free one. Raises OptionError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # TCP by name: else asyncio does not switch off Nagle's algorithm, and every answer waits 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"port {port} of {host} cannot be opened ({reason}); choose another with --port") from None
    return listener


def run(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_open: Callable[[], Any] = lambda: None,
    log_level: str = "warning",
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT, and then finish what is running (`Limits.shutdown_s`).

    ``on_open`` is called once connections are taken. ``trusted_proxies``: addresses and networks, besides this
    machine's own, whose X-Forwarded-For is believed. What is logged goes where `logging` was told to send it. Raises
    what kept the model from being loaded.
    """
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        forwarded_allow_ips=[*LOOPBACK, *trusted_proxies],
        http=Connection,
        ws="none",
        log_level=log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(service.limits.shutdown_s) or 1,
    )
    server = uvicorn.Server(config)
    # The event loop that uvicorn would choose: uvloop where it is installed.
    with _quiet_signals(), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(server, listener, service, on_open))
    if service.load_error is not None:
        raise service.load_error


async def _serve(server: uvicorn.Server, listener: socket.socket, service: Service, on_open: Callable[[], Any]) -> None:
    serving = asyncio.create_task(server.serve([listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        on_open()
    while not serving.done():
        if service.load_error is not None:
            server.should_exit = True
        await asyncio.wait((serving,), timeout=0.2)
    await serving


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done; a server that ended well exits with 0."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
