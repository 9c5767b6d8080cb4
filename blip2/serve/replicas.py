"""Several replicas behind one port: Ray Serve starts them, watches them, and distributes requests.

A replica is a process with its own models, queue, limits and image cache. The port, the page, the keys and the other
access checks belong to the front process (`front`), which is the one that was started; Ray's proxies are off. A request
goes unparsed to the less busy of two random replicas, so each may have to encode the same image once. Every answer and
every line of /metrics names its replica.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from prometheus_client.core import Metric
from starlette.types import Message, Scope

from blip2.api.cluster import connect, prepare, shares
from blip2.errors import OptionError
from blip2.serve.front import Front, ReplicaDied
from blip2.serve.limits import Limits
from blip2.serve.replica import Create, load_error, replica_of
from blip2.serve.service import Models

NAME = "blip2"
DEPLOYMENT = "replica"
SPARE_REQUESTS = 64
"""Requests that a replica gets beyond its queue; its `Admission` refuses them with our messages."""
HEALTH_S = 10
"""Seconds without an answer after which, three times in a row, a replica is ended and replaced."""
END_S = 5
"""Seconds for a replica to end, after the front process has waited for the last answers."""
SHUTDOWN_SPARE_S = 10
"""Further seconds for Ray to end the replicas."""
PIECE_BYTES = 90_000
"""Size of the pieces of a body. Ray would put larger ones into its object store, which is small and goes to disk."""
DIRECT = {"RAY_task_rpc_inlined_bytes_limit": str(2**28)}
"""Bytes of a request sent with the call, whatever its pieces; 10 MB by default."""


def run_replicas(
    load: Callable[[], Models],
    create: Create,
    run_front: Callable[[Front], None],
    limits: Limits,
    *,
    replicas: int,
    address: str | None,
    device: str,
    on_open: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish running requests (`Limits.shutdown_s`).

    ``load`` and ``create`` (from models and a replica's name to an application) are called in each replica.
    ``run_front`` is called here and serves until the stop. ``address``: a Ray cluster that this machine belongs to;
    None starts one on this machine, which ends with this process. ``on_open`` is called when every replica has loaded.
    Raises the error that kept the model from loading, ImportError without Ray.
    """
    with ExitStack() as undo:
        os.environ.update(DIRECT)
        prepare(address)  # Ray reads the environment when it is imported
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        stopped = threading.Event()
        _handle_signals(stopped, undo)
        # In a thread Ray installs no Python signal handlers. Processes of Ray end with the thread that started them.
        executor = undo.enter_context(ThreadPoolExecutor(1))
        undo.callback(ray.shutdown)
        executor.submit(connect, ray, address).result()
        _handle_signals(stopped, undo)  # again: Ray's C++ code has installed one that aborts
        if stopped.is_set():
            return
        before = serve.status()
        if NAME in before.applications:
            raise OptionError(f"the cluster at {address} already runs blip2 serve; stop that first")
        is_ours = address is not None and not (before.applications or before.proxies)
        undo.callback(_finish, serve, is_ours=is_ours)
        deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=replicas,
            ray_actor_options=shares(ray.nodes(), replicas, device),
            max_ongoing_requests=limits.max_queue + SPARE_REQUESTS,
            max_queued_requests=-1,  # the front process counts them
            max_constructor_retry_count=1,
            health_check_period_s=1,
            health_check_timeout_s=HEALTH_S,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=END_S,
            logging_config=_logging(),
        )(replica_of(serve, load, create))
        run_front(Front(RayReplicas(serve, deployment.bind()), limits, replicas, on_open))


def _pieces(body: bytes) -> list[bytes]:
    return [body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES)]


def _handle_signals(stopped: threading.Event, undo: ExitStack) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        undo.callback(signal.signal, number, signal.signal(number, lambda *_: stopped.set()))


def _logging() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


class RayReplicas:
    """`front.Replicas` with Ray Serve."""

    def __init__(self, serve: Any, application: Any) -> None:
        self._serve = serve
        self._application = application
        self._answer: Any = None
        self._families: Any = None

    def start(self, stopped: threading.Event) -> bool:
        self._serve.start(proxy_location="Disabled", logging_config=_logging())
        if not _started(self._serve, self._application, stopped):
            return False
        handle = self._serve.get_deployment_handle(DEPLOYMENT, NAME)
        self._answer = handle.options(method_name="answer", stream=True)
        self._families = handle.options(method_name="families")
        return True

    def num_running(self) -> int:
        states = self._serve.status().applications[NAME].deployments[DEPLOYMENT].replica_states
        return int(sum(count for state, count in states.items() if state == "RUNNING"))

    async def answer(self, scope: Scope, left_s: float, body: list[bytes]) -> AsyncGenerator[list[Message], None]:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        response = self._answer.remote(scope, left_s, *_pieces(body.pop()))  # without keeping a copy here
        is_over = False
        try:
            async for pickled in response:
                messages = pickle.loads(pickled)
                is_over = messages[-1]["type"] == "http.response.body" and not messages[-1].get("more_body", False)
                yield messages
        except RayTaskError:
            is_over = True
            raise
        except (RayError, RayServeException) as error:
            is_over = True
            raise ReplicaDied from error
        finally:
            if not is_over:
                response.cancel()

    async def families(self) -> list[list[Metric]]:
        response = self._families.broadcast("families")
        found = await response.results_async(return_exceptions=True)
        return [pickle.loads(each) for each in found if isinstance(each, bytes)]


def _started(serve: Any, application: Any, stopped: threading.Event) -> bool:
    """True once all replicas have loaded. False: a stop signal came first. Raises what went wrong."""
    serve.run_many([serve.RunTarget(application, name=NAME, route_prefix=None)], wait_for_applications_running=False)
    while not stopped.wait(0.1):
        status = serve.status().applications[NAME]
        if status.status == "RUNNING":
            return True
        if status.status == "DEPLOY_FAILED":
            accounts = [each.message for each in status.deployments.values()]
            raise load_error("\n".join([status.message, *accounts]))
    return False


def _finish(serve: Any, *, is_ours: bool) -> None:
    """End the replicas, and a cluster's Serve if nobody else uses it; that of this machine ends with its cluster."""
    serve.delete(NAME, _blocking=False)
    end_s = time.monotonic() + END_S + SHUTDOWN_SPARE_S
    while NAME in serve.status().applications and time.monotonic() < end_s:
        time.sleep(0.1)
    if is_ours:
        serve.shutdown()
