"""Runs an application until a stop signal, then finishes running requests, within a time limit."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from blip2.checkpoint.reader import release_memory
from blip2.errors import OptionError
from blip2.serve.connection import Connection
from blip2.serve.connections import MAX_CONNECTIONS as MAX_CONNECTIONS
from blip2.serve.service import Service

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

SPARE_DESCRIPTORS = 256
"""File descriptors for other uses than connections: model files, downloads, reader processes."""
BACKLOG = 2048
"""Connections waiting to be accepted; beyond it, a client retries after a second."""
ACCEPTED_PER_TURN = 32
"""Connections that asyncio accepts per turn. Each has a descriptor for some turns before it is counted."""
END_S, FORCED_END_S = 0.5, 1.5
"""Seconds after the shutdown timeout: for clients to get the error; and until the process exits, whatever runs."""
MANY_CONNECTIONS = 100
"""Number of closed connections after which their memory is returned to the system."""
DEATH_S = 2.0
"""Seconds for which a server without a model still answers."""
EX_DEAD_MODEL = 70
"""Exit code when the model's thread has died; a process manager may restart the server."""
EX_FORCED = 1
"""Exit code when something kept the process from ending in time."""
LOOPBACK = ("127.0.0.1", "::1")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises OptionError if it cannot be opened."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Name TCP: otherwise asyncio leaves Nagle's algorithm on, and every answer is 40 ms late.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"port {port} of {host} cannot be opened ({reason}); choose another with --port") from None
    return listener


def affordable(max_connections: int) -> tuple[int, int]:
    """How many connections are possible, at most ``max_connections``, and how many are accepted per turn.

    The limit on descriptors is raised as far as needed and allowed. If it stays too low, half of them are kept spare.
    """
    needed = max_connections + SPARE_DESCRIPTORS
    if resource is None:
        return max_connections, ACCEPTED_PER_TURN
    soft, hard = (
        needed if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft < needed and soft < hard:
        with suppress(OSError, ValueError):
            soft = min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft >= needed:
        return max_connections, ACCEPTED_PER_TURN
    return max(min(max_connections, soft // 2), 1), max(min(ACCEPTED_PER_TURN, soft // 16), 1)


def run(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_open: Callable[[], Any] = lambda: None,
    log_level: str = "warning",
    trusted_proxies: Sequence[str] = (),
    ends_process: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish running requests (`Limits.shutdown_s`).

    A second SIGINT ends the process at once. ``on_open`` is called once connections are accepted. ``trusted_proxies``:
    addresses and networks, besides this machine's own, whose X-Forwarded-For is trusted. Log messages go where
    `logging` is configured to send them. ``ends_process``: the process should exit afterwards, and is forced to if
    something blocks it after a stop signal.

    Raises the error that kept the model from loading; SystemExit if the model's thread has died.
    """
    service: Service = app.state.service
    service.connections.max_connections, num_accepted = affordable(service.limits.max_connections)
    config = uvicorn.Config(
        app,
        forwarded_allow_ips=[*LOOPBACK, *trusted_proxies],
        http=Connection,
        ws="none",
        log_level=log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=num_accepted,
    )
    server = Server(config, service)
    # The event loop that uvicorn would choose: uvloop if it is installed.
    with _quiet_signals():
        try:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(_serve(server, listener, service, on_open))
        finally:
            if not ends_process or service.load_error is not None:  # not yet reported
                server.may_outlive.set()
    if ends_process and service.load_error is None:
        signal.signal(signal.SIGINT, lambda *_: _end_process("stopped at once", 128 + signal.SIGINT))
    if service.load_error is not None:
        raise service.load_error
    if service.death is not None:
        sys.stderr.write(f"blip2: {_of_death(service)}; restart the server\n")
        raise SystemExit(EX_DEAD_MODEL)


class Server(uvicorn.Server):
    """Ends in time, whatever is running."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.may_outlive = threading.Event()
        """The process may continue and is not forced to exit."""
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            _end_process("stopped at once", 128 + sig)
        super().handle_exit(sig, frame)
        self.end(self._service.limits.shutdown_s, EX_FORCED)

    def end(self, within_s: float, code: int) -> None:
        """Stop, and finish running requests within the time given."""
        self.should_exit = True
        if self._service.end_s is not None:
            return
        self._service.end_s = time.monotonic() + within_s
        # uvicorn would cancel silently; this is for what does not end even then.
        self.config.timeout_graceful_shutdown = within_s + END_S  # type: ignore[assignment]
        threading.Thread(target=self._watch, args=(within_s, code), name="blip2 end", daemon=True).start()

    def _watch(self, within_s: float, code: int) -> None:
        if not self.may_outlive.wait(within_s + FORCED_END_S):
            death = "" if self._service.death is None else f"{_of_death(self._service)}; "
            _end_process(f"{death}something did not end within {within_s:g} s and was aborted", code)


def _of_death(service: Service) -> str:
    error = service.death
    return f"the model has stopped ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _end_process(words: str, code: int) -> None:
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"blip2: {words}\n")
        sys.stderr.flush()
    os._exit(code)


async def _serve(server: Server, listener: socket.socket, service: Service, on_open: Callable[[], Any]) -> None:
    serving = asyncio.create_task(server.serve([listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        with suppress(OSError):
            listener.listen(BACKLOG)
        on_open()
    peak = 0
    while not serving.done():
        peak = max(peak, len(service.connections))
        if peak > MANY_CONNECTIONS and len(service.connections) < peak // 4:
            peak = 0
            await asyncio.to_thread(release_memory)
        if service.load_error is not None:
            server.end(DEATH_S, EX_FORCED)
        if service.death is not None:  # waiting requests are being answered with an error
            server.end(DEATH_S, EX_DEAD_MODEL)
        if service.end_s is not None and time.monotonic() >= service.end_s:
            service.end_requests()
        await asyncio.wait((serving,), timeout=0.1)
    await serving


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn raises the stop signal again when it is finished; a server that ended normally should exit with 0."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
