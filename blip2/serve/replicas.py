"""The application several times behind one port: Ray Serve starts it, watches it, and deals out the requests.

A replica is a process with everything of its own: models, queue, limits, the pictures that it remembers. Ray's proxy
gives a request to the less busy of two replicas, and has not read by then what picture it is about; so each replica
may have to encode the same one once. Every answer, and every line of /metrics, names its replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI

from blip2 import errors
from blip2.errors import OptionError
from blip2.serve.limits import Limits
from blip2.serve.run import MAX_CONNECTIONS, listen
from blip2.serve.service import Models

NAME = "blip2"
SPARE_REQUESTS = 64
"""What a replica is given beyond its queue: the doorman turns them away in our words, or they are no work at all."""
SHUTDOWN_SPARE_S = 10
"""For Ray to end the replicas, beyond what these wait for their last answers."""
OBJECT_STORE_BYTES = 100_000_000
"""Nothing of ours goes through it; by default Ray takes a third of the memory."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
"""Ray tells its makers nothing, and keeps its log in files of its own."""
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""A cluster of one machine, whose many ports are open to that machine alone; on other systems that is Ray's default."""
LOAD_ERROR = "blip2 was not loaded: "

Create = Callable[[Callable[[], Models], str], FastAPI]


def run_replicas(
    load: Callable[[], Models],
    create: Create,
    limits: Limits,
    *,
    replicas: int,
    address: str | None,
    host: str,
    port: int,
    device: str,
    on_open: Callable[[int], Any] = lambda port: None,
) -> None:
    """Serve until SIGTERM or SIGINT, and then finish what is running (`Limits.shutdown_s`).

    ``load`` and ``create`` (models and a replica's name into an application) are called in each replica. ``address``:
    a cluster of Ray's; None starts one on this machine, which ends with us. ``on_open`` is called with the port once
    every replica has loaded. Raises what kept the model from being loaded, ImportError without Ray.
    """
    if address is not None and port == 0:
        raise OptionError("--port 0 takes a free one of this machine, but a cluster has others; name one")
    if address is None:
        with listen(host, port) as listener:  # an error in our words; Ray opens it anew, in a process of its own
            port = listener.getsockname()[1]
    _prepare(address)  # before Ray is imported, which reads the environment once
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stopped = threading.Event()
    with ExitStack() as undo:
        _heed_signals(stopped, undo)
        # In a thread Ray's Python puts no signal handlers; and what Ray starts ends with the thread that started it.
        aside = undo.enter_context(ThreadPoolExecutor(1))
        undo.callback(ray.shutdown)
        aside.submit(_connect, ray, address).result()
        _heed_signals(stopped, undo)  # once more: Ray's C++ has put one, which aborts
        if stopped.is_set():
            return
        options = _shares(ray.nodes(), replicas, device)
        if address is not None and serve.status().proxies:
            raise OptionError(f"the cluster at {address} runs Ray Serve already, at a port of its own; stop that first")
        undo.callback(_finish, serve, address, limits.shutdown_s)
        serve.start(http_options={"host": host, "port": port}, logging_config=_logging())
        deployment = serve.deployment(
            name="replica",
            num_replicas=replicas,
            ray_actor_options=options,
            max_ongoing_requests=limits.max_queue + SPARE_REQUESTS,
            max_queued_requests=MAX_CONNECTIONS,
            max_constructor_retry_count=1,
            health_check_period_s=1,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=limits.shutdown_s,
            logging_config=_logging(),
        )(replica_of(serve, load, create))
        if not _started(serve, deployment.bind(), stopped):
            return
        on_open(port)
        stopped.wait()


def _prepare(address: str | None) -> None:
    os.environ.update(QUIET)
    if address is None:
        os.environ.update(ALONE)
        if "RAY_AUTH_MODE" not in os.environ:  # a key that ends with us, in place of one in a file
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _heed_signals(stopped: threading.Event, undo: ExitStack) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        undo.callback(signal.signal, number, signal.signal(number, lambda *_: stopped.set()))


def _connect(ray: Any, address: str | None) -> None:
    if address is not None:
        host, _, port = address.rpartition(":")
        try:
            if host and port.isdigit():  # where nobody listens, Ray would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            ray.init(address, logging_level="error")
        except (OSError, ValueError) as error:
            raise OptionError(f"no Ray cluster can be had at {address} ({error}); give HOST:PORT, or auto") from error
        return
    ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, logging_level="error")


def _logging() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def replica_of(serve: Any, load: Callable[[], Models], create: Create) -> type:
    """The class that Ray makes its replicas of."""

    def build() -> FastAPI:
        # Models first, so that nobody is sent here before they are there, and their error ends the start.
        try:
            models = load()
        except Exception as error:
            raise RuntimeError(LOAD_ERROR + json.dumps([type(error).__name__, str(error)])) from error
        return create(lambda: models, serve.get_replica_context().replica_id.unique_id)

    class Replica:
        app: FastAPI

        async def check_health(self) -> None:
            """Ray asks before the first request and then every few seconds; an error, and it starts a new replica."""
            service = self.app.state.service
            while (refusal := service.refusal()) is not None and refusal.code == "loading":
                await asyncio.sleep(0.01)
            if refusal is not None and refusal.code != "stopping":
                raise RuntimeError(refusal.message)

    replica: type = serve.ingress(build)(Replica)
    return replica


def _started(serve: Any, application: Any, stopped: threading.Event) -> bool:
    """Whether all replicas have loaded; False: a stop signal came first. Raises what went wrong."""
    serve.run_many([serve.RunTarget(application, name=NAME)], wait_for_applications_running=False)
    while not stopped.wait(0.1):
        status = serve.status().applications[NAME]
        if status.status == "RUNNING":
            return True
        if status.status == "DEPLOY_FAILED":
            accounts = [each.message for each in status.deployments.values()]
            raise load_error("\n".join([status.message, *accounts]))
    return False


def _finish(serve: Any, address: str | None, shutdown_s: float) -> None:
    """Let the replicas finish what they answer. A cluster's Serve ends as well; ours goes down with its cluster."""
    serve.delete(NAME, _blocking=False)
    end_s = time.monotonic() + shutdown_s + SHUTDOWN_SPARE_S
    while NAME in serve.status().applications and time.monotonic() < end_s:
        time.sleep(0.1)
    if address is not None:
        serve.shutdown()


def load_error(message: str) -> Exception:
    """What a replica could not do, out of Ray's account of it, which holds tracebacks of several processes."""
    if (found := re.search(rf"{LOAD_ERROR}(\[.*\])", message)) is None:
        return RuntimeError(message.strip().rsplit("\n", 1)[-1])
    name, words = json.loads(found[1])
    kind = getattr(errors, name, None)
    return kind(words) if kind is not None else RuntimeError(f"{name}: {words}")


def _shares(nodes: Sequence[dict[str, Any]], replicas: int, device: str) -> dict[str, Any]:
    """What each replica is given: a GPU, if there are any, and an equal share of the processors.

    OptionError if there is not enough of either.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(resources.get("GPU", 0) for resources in found))
    needs_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if needs_gpu and gpus < replicas:
        raise OptionError(f"--replicas is {replicas}, one GPU each, and there are {gpus}; give fewer, or --device cpu")
    if ":" in device:
        raise OptionError(f"--device {device} is one GPU, but Ray gives each replica its own; use cuda or auto")
    # A replica cannot lie on two machines, so the share is one of which the machines together hold enough.
    cpus = [resources.get("CPU", 0) for resources in found]
    sizes = [int(each / parts * 1e4) / 1e4 for each in cpus for parts in range(1, replicas + 1)]
    share = max((size for size in sizes if size and sum(each // size for each in cpus) >= replicas), default=0)
    if not share:
        raise OptionError("the cluster has no processor to give; see: ray status")
    return {"num_cpus": share, "num_gpus": int(needs_gpu)}
