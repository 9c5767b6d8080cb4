"""Ray clusters: connecting, starting one on this machine, the share of each replica, and actors as workers."""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from blip2 import __version__
from blip2.api.worker import Worker, sendable
from blip2.collection.dispatch import Died, Failed, Given, Message, More, Ready
from blip2.errors import CollectionError, OptionError

OBJECT_STORE_BYTES = 100_000_000
"""Bytes of Ray's object store, only used for large objects; by default Ray takes a third of the memory."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
"""Turns off Ray's usage reports, and keeps its log in files."""
LOCAL_CLUSTER = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Options for a cluster on one machine whose ports are only open to it; the default on systems other than Linux."""


def prepare(address: str | None) -> None:
    """Set environment variables. Call it before Ray is imported, which reads them once."""
    os.environ.update(QUIET)
    if address is None:
        os.environ.update(LOCAL_CLUSTER)
        if "RAY_AUTH_MODE" not in os.environ:  # a temporary key instead of one in a file
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def connect(ray: Any, address: str | None, *, is_quiet: bool = False) -> None:
    """Connect to a cluster, or start one on this machine that ends with this process. ``is_quiet``: hides the output of
    its processes. Raises OptionError."""
    asked = {"logging_level": "error", "log_to_driver": not is_quiet}
    if address is not None:
        if "://" in address:  # Ray Client cannot stream results
            raise OptionError(f"--address is {address}; give HOST:PORT, on a machine of the cluster")
        host, _, port = address.rpartition(":")
        try:
            if host and port.isdigit():  # Ray would retry for minutes if nothing is listening
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(address, **asked)
        except (OSError, ValueError) as error:
            raise OptionError(f"no Ray cluster at {address} ({error}); give HOST:PORT, or auto") from error
        return
    ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **asked)


def shares(nodes: Sequence[dict[str, Any]], replicas: int, device: str) -> dict[str, Any]:
    """The resources of each replica: a GPU, if there are any, and an equal share of the processors.

    Raises OptionError if there are too few.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(resources.get("GPU", 0) for resources in found))
    needs_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if needs_gpu and gpus < replicas:
        raise OptionError(f"--replicas is {replicas}, one GPU each, but there are {gpus}; give fewer, or --device cpu")
    if ":" in device:
        raise OptionError(f"--device {device} is one GPU, but Ray gives each replica its own; use cuda or auto")
    # A replica cannot span machines, so the share must fit often enough into the single machines.
    cpus = [resources.get("CPU", 0) for resources in found]
    sizes = [int(each / parts * 1e4) / 1e4 for each in cpus for parts in range(1, replicas + 1)]
    share = max((size for size in sizes if size and sum(each // size for each in cpus) >= replicas), default=0)
    if not share:
        raise OptionError("the cluster has no free processor; see: ray status")
    return {"num_cpus": share, "num_gpus": int(needs_gpu)}


# ---- workers ----


class Actors:
    """`dispatch.Workers` as Ray actors. Each runs one call at a time and streams its messages.

    ``order``: a pickled `worker.Order`. Ray must not restart an actor itself, since a worker has to know what is
    finished. There is no timeout for slow workers.
    """

    def __init__(self, order: bytes, number: int, address: str | None, device: str) -> None:
        self.number = number
        self._undo = ExitStack()
        if "ray" not in sys.modules:  # otherwise the calling program has set it up
            prepare(address)
        import ray

        self._ray: Any = ray
        if not ray.is_initialized():
            # In a thread Ray installs no Python signal handlers. Its processes end with the thread that started them.
            executor = self._undo.enter_context(ThreadPoolExecutor(1))
            is_main = threading.current_thread() is threading.main_thread()
            handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM) if is_main}
            self._undo.callback(ray.shutdown)
            executor.submit(connect, ray, address, is_quiet=True).result()
            for kind, handler in handlers.items():  # Ray's C++ code has installed one that aborts
                signal.signal(kind, handler)
        try:
            share = shares(ray.nodes(), number, device)
            self._threads = max(int(share["num_cpus"]), 1)
            self._actor = ray.remote(max_restarts=0, max_task_retries=0, **share)(_Actor)
            self._order = ray.put(order)
        except BaseException:
            self.close()
            raise
        self._actors: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    def start(self, worker: int) -> None:
        self._actors[worker] = self._actor.remote(worker, self._threads)
        begin = self._actors[worker].begin.options(num_returns="streaming")
        self._streams[worker] = begin.remote(self._order, __version__)

    def give(self, worker: int, given: Given | None) -> None:
        self._streams[worker] = self._actors[worker].do.options(num_returns="streaming").remote(given)

    def receive(self) -> tuple[int, Message]:
        from ray.exceptions import RayError

        workers = {stream: worker for worker, stream in self._streams.items()}
        ready, _ = self._ray.wait([*workers], num_returns=1)
        worker = workers[ready[0]]
        try:
            return worker, pickle.loads(self._ray.get(next(ready[0])))
        except StopIteration:
            del self._streams[worker]
            return worker, More(is_idle=True)
        except RayError as error:
            del self._streams[worker]
            return worker, Died(_reason(error))

    def close(self) -> None:
        for actor in getattr(self, "_actors", {}).values():
            self._ray.kill(actor)
        self._undo.close()


def _reason(error: Exception) -> str:
    """The last line of Ray's message, which has many."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"Ray: {lines[-1][:300]}" if lines else type(error).__name__


class _Actor:
    """A worker. Its errors are sent as messages, so that they arrive unchanged."""

    def __init__(self, number: int, threads: int) -> None:
        self._number = number
        self._threads = threads

    def begin(self, order: bytes, version: str) -> Iterator[bytes]:
        try:
            if version != __version__:
                where = f"{socket.gethostname()} has blip2 {__version__}, and this machine has {version}"
                raise CollectionError(f"{where}; results may differ, so install the same version on both")
            read = pickle.loads(order)
            if read.threads is None:  # set by the user
                self._worker = Worker(read, self._number, None)
            else:
                os.environ.pop("OMP_NUM_THREADS", None)  # set by Ray: 1, or its share
                self._worker = Worker(replace(read, threads=self._threads), self._number, None)
        except BaseException as error:
            yield pickle.dumps(Failed(sendable(error)))
            return
        yield pickle.dumps(Ready(self._worker.facts))

    def do(self, given: Given) -> Iterator[bytes]:
        messages: SimpleQueue[Message | None] = SimpleQueue()

        def work() -> None:
            try:
                self._worker.do(iter([given]), messages.put)
            except BaseException as error:
                messages.put(Failed(sendable(error)))
            messages.put(None)

        threading.Thread(target=work, daemon=True).start()
        while (message := messages.get()) is not None:
            yield pickle.dumps(message)
