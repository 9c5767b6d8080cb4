"""The models several times behind one port: Ray Serve starts the replicas, watches them, and deals out the requests.

A replica is a process with everything of its own: models, queue, limits, the images that it remembers. The port, the
page, the keys and whatever else guards the door are the front's (`front`), which runs in the process that was started;
Ray's own proxies are off. A request goes to the less busy of two replicas, unread, so that each may have to encode the
same image once. Every answer, and every line of /metrics, names its replica.
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
"""What a replica is given beyond its queue: its doorman turns them away in our words."""
HEALTH_S = 10
"""A replica that three times says nothing for so long is ended, and another is started."""
END_S = 5
"""For a replica to end, once the front has waited for the last answers."""
SHUTDOWN_SPARE_S = 10
"""For Ray to end the replicas beyond that."""
PIECE_BYTES = 90_000
"""A body travels in such pieces. Larger ones Ray would put into the object store, which is small and goes to disk."""
DIRECT = {"RAY_task_rpc_inlined_bytes_limit": str(2**28)}
"""So much of a request is sent along with the call, whatever its pieces; by default 10 MB."""


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
    """Serve until SIGTERM or SIGINT, and then finish what is running (`Limits.shutdown_s`).

    ``load`` and ``create`` (models and a replica's name into an application) are called in each replica,
    ``run_front`` here: it serves, from now on, until the stop. ``address``: a cluster of Ray's, to which this machine
    belongs; None starts one on this machine, which ends with us. ``on_open`` is called when every replica has loaded.
    Raises what kept the model from being loaded, ImportError without Ray.
    """
    with ExitStack() as undo:
        os.environ.update(DIRECT)
        prepare(address)  # before Ray is imported, which reads the environment once
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        stopped = threading.Event()
        _heed_signals(stopped, undo)
        # In a thread Ray's Python puts no signal handlers; and what Ray starts ends with the thread that started it.
        aside = undo.enter_context(ThreadPoolExecutor(1))
        undo.callback(ray.shutdown)
        aside.submit(connect, ray, address).result()
        _heed_signals(stopped, undo)  # once more: Ray's C++ has put one, which aborts
        if stopped.is_set():
            return
        before = serve.status()
        if NAME in before.applications:
            raise OptionError(f"the cluster at {address} runs blip2 serve already; stop that first")
        is_ours = address is not None and not (before.applications or before.proxies)
        undo.callback(_finish, serve, is_ours=is_ours)
        deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=replicas,
            ray_actor_options=shares(ray.nodes(), replicas, device),
            max_ongoing_requests=limits.max_queue + SPARE_REQUESTS,
            max_queued_requests=-1,  # the front's doorman counts them
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


def _heed_signals(stopped: threading.Event, undo: ExitStack) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        undo.callback(signal.signal, number, signal.signal(number, lambda *_: stopped.set()))


def _logging() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


class RayReplicas:
    """`front.Replicas`, by Ray Serve."""

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

        response = self._answer.remote(scope, left_s, *_pieces(body.pop()))  # and not kept here, too
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
    """Whether all replicas have loaded; False: a stop signal came first. Raises what went wrong."""
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
    """End the replicas, and a cluster's Serve if nobody else uses it; that of this machine goes with its cluster."""
    serve.delete(NAME, _blocking=False)
    end_s = time.monotonic() + END_S + SHUTDOWN_SPARE_S
    while NAME in serve.status().applications and time.monotonic() < end_s:
        time.sleep(0.1)
    if is_ours:
        serve.shutdown()
