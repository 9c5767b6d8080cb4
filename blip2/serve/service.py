"""Between the event loop and the models' thread: loading, waiting, deadlines, disconnects."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request, Response

from blip2.api import Matcher, Pipeline
from blip2.generation import Hypothesis
from blip2.serve.admission import END
from blip2.serve.bodies import Bodies
from blip2.serve.cache import ImageCache
from blip2.serve.connections import Connections
from blip2.serve.errors import ApiError
from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits
from blip2.serve.loading import Loading
from blip2.serve.metrics import Metrics
from blip2.serve.places import Places, too_late
from blip2.serve.reading import Readings
from blip2.serve.tickets import Piece, Steps, Ticket
from blip2.serve.turns import FairPool
from blip2.serve.worker import Worker, WorkerError
from blip2.tasks.match import ImageFeatures
from blip2.text import LONG_TEXT

logger = logging.getLogger("blip2.serve")

NUM_HELPERS = 2
"""Threads for work of neither the models nor the event loop."""
AT_ONCE_S, IN_THREAD_S = 0.002, 0.02
"""Seconds that such work may block the event loop, and a thread before it checks for a disconnect."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Models:
    """The served models: a generative model, and optionally a matching model."""

    pipeline: Pipeline
    matcher: Matcher | None = None


class Service:
    """The state shared by all routes. ``load`` runs in a thread after the port is opened, and notes in ``loading`` how
    far it is."""

    def __init__(
        self,
        load: Callable[[], Models],
        limits: Limits,
        fetcher: Fetcher,
        replica: str | None = None,
        loading: Loading | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = Metrics(replica)
        self.readings = Readings(limits, self.metrics, fetcher)
        self.connections = Connections(limits.max_connections, self.metrics.refuse)
        self.places = Places(limits)
        self.bodies = Bodies(limits)
        self.metrics.follow_connections(self.connections.count)
        self.metrics.body_bytes.set_function(lambda: self.bodies.num_bytes)
        self.load_error: BaseException | None = None
        self.is_stopping = False
        self.end_s: float | None = None
        """The time (monotonic) by which everything has to end, once the process was asked to stop."""
        self._helpers: FairPool[None] = FairPool([None] * NUM_HELPERS)
        self._post = Post()
        self._load = load
        self._loading = loading or Loading()
        self._worker: Worker | None = None

    # ---- start and stop ----

    def start(self) -> None:
        """Call this in the event loop that answers requests."""
        self.readings.start()
        threading.Thread(target=self._load_models, name="blip2 loading", daemon=True).start()

    def _load_models(self) -> None:
        try:
            models = self._load()
            self._worker = Worker(models.pipeline, models.matcher, self.limits, self.metrics)
        except BaseException as error:  # reported by /ready and by `run`
            if self.is_stopping:  # errors during the shutdown do not matter
                return
            self.load_error = error
            logger.error("the model cannot be loaded: %s", error)

    async def stop(self) -> None:
        self.is_stopping = True
        if self._worker is not None:
            left_s = self.limits.shutdown_s if self.end_s is None else max(self.end_s - time.monotonic(), 0)
            await asyncio.to_thread(self._worker.close, left_s)
        self.readings.close()

    def end_requests(self) -> None:
        """End all waiting requests with an error."""
        self.is_stopping = True
        stopping = ApiError(503, "stopping", "the server is stopping; send it again", headers={"Retry-After": "2"})
        self.bodies.end_all(stopping)
        self.places.end_all(stopping)

    @property
    def death(self) -> BaseException | None:
        """The error that ended the models' thread, if any."""
        return None if self._worker is None else self._worker.death

    def refusal(self) -> ApiError | None:
        """Why nothing can be answered at present, or None."""
        if self.load_error is not None:
            return ApiError(503, "model_failed", "the model cannot be loaded; see the server's output")
        if self._worker is None:
            return self._loading.refusal()
        if self.death is not None:
            return ApiError(503, "model_stopped", "the model has stopped; the server has to be restarted")
        if self.is_stopping or not self._worker.is_alive:
            return ApiError(503, "stopping", "the server is stopping")
        return None

    @property
    def worker(self) -> Worker:
        if (refusal := self.refusal()) is not None:
            raise refusal
        assert self._worker is not None
        return self._worker

    @property
    def pipeline(self) -> Pipeline:
        return self.worker.pipeline

    @property
    def matcher(self) -> Matcher:
        """The matching model. Raises ApiError if there is none."""
        matcher = self.worker.matcher
        if matcher is None:
            raise self._no_matcher()
        return matcher

    @staticmethod
    def _no_matcher() -> ApiError:
        return ApiError(
            400, "no_matching_model", "this server has no matching model; start it with "
            "--matching-model"
        )  # fmt: skip

    @property
    def features(self) -> ImageCache[ImageFeatures]:
        """The cache of the `matcher`. Raises ApiError if there is none."""
        if self.worker.features is None:
            raise self._no_matcher()
        return self.worker.features

    async def numbers(self) -> bytes:
        """The text for /metrics."""
        return self.metrics.text()

    # ---- work ----

    async def answers(self, ticket: Ticket) -> list[Hypothesis]:
        """The answers to one prompt. They are cancelled if nobody waits for them any more."""
        worker = self.worker
        try:
            worker.submit(ticket)
            return await asyncio.wrap_future(ticket.answers)
        except WorkerError as error:
            raise ApiError(503, "model_stopped", str(error)) from error
        finally:
            worker.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a ticket. May also be called after its end."""
        if self._worker is not None:
            self._worker.cancel(ticket)

    async def compute(self, client: str, steps: Steps[Value]) -> Value:
        """The result of work in portions on the models' thread. It stops after a portion if nobody waits any more."""
        try:
            return await asyncio.wrap_future(self.worker.call(client, steps))
        except WorkerError as error:
            raise ApiError(503, "model_stopped", str(error)) from error

    async def in_thread(self, client: str, items: Iterator[Value], *, is_small: bool = True) -> list[Value]:
        """All items of an iterator, for parsing texts or encoding answers. Work of more than a moment runs in a thread.

        Clients take turns for a thread, and a client that disconnects leaves it soon. Each item has to be quick, or
        release the GIL meanwhile. Small work (``is_small``) is first tried on the event loop for a moment.
        """
        found: list[Value] = []
        if is_small and _go_on(items, found, AT_ONCE_S):
            return found
        async with self._helpers.lease(client):
            while not await asyncio.to_thread(_go_on, items, found, IN_THREAD_S):
                pass
        return found

    async def read_text(self, client: str, text: str, function: Callable[[], Value]) -> Value:
        """The function's result for a text, in a thread if the text is long."""
        [found] = await self.in_thread(client, (function() for _ in (text,)), is_small=len(text) <= LONG_TEXT)
        return found

    async def rendered(self, client: str, pieces: Iterator[bytes], headers: dict[str, str] | None = None) -> Response:
        """A JSON response made of pieces."""
        return Response(b"".join(await self.in_thread(client, pieces)), headers=headers, media_type="application/json")

    async def stream(self, request: Request, ticket: Ticket) -> tuple[AsyncGenerator[Piece | Hypothesis, None], Ticket]:
        """The only answer in pieces, then as a whole; and its ticket.

        Waits for the first piece, so that earlier errors still become an error response. Later errors are raised by the
        generator.
        """
        loop = asyncio.get_running_loop()
        pieces_queue: asyncio.Queue[Piece | None] = asyncio.Queue()

        def on_piece(piece: Piece) -> None:
            self._post.send(loop, pieces_queue, piece)

        ticket = replace(ticket, on_piece=on_piece)
        worker = self.worker
        try:
            worker.submit(ticket)
            ticket.answers.add_done_callback(lambda _: self._post.send(loop, pieces_queue, None))
            first = await pieces_queue.get()
            if first is None:
                ticket.answers.result()
        except WorkerError as error:
            worker.cancel(ticket)
            raise ApiError(503, "model_stopped", str(error)) from error
        except BaseException:
            worker.cancel(ticket)
            raise

        async def pieces() -> AsyncGenerator[Piece | Hypothesis, None]:
            is_late = False

            def give_up() -> None:
                nonlocal is_late
                is_late = True
                pieces_queue.put_nowait(None)

            left_s = max(request.scope[END] - time.monotonic(), 0)
            timer = loop.call_later(left_s, give_up)  # one timer, not one per piece
            try:
                piece = first
                while piece is not None:
                    yield piece
                    piece = await pieces_queue.get()
                    if is_late:
                        raise too_late()
                yield ticket.answers.result()[0]
            except WorkerError as error:
                raise ApiError(503, "model_stopped", str(error)) from error
            finally:
                timer.cancel()
                worker.cancel(ticket)

        return pieces(), ticket


class Post:
    """Passes pieces from the models' thread to the event loop, those of all streams of one step together, since waking
    the loop costs more than passing a piece."""

    def __init__(self) -> None:
        self._sent: deque[tuple[asyncio.Queue[Piece | None], Piece | None]] = deque()
        self._is_called = False

    def send(self, loop: asyncio.AbstractEventLoop, to: asyncio.Queue[Piece | None], piece: Piece | None) -> None:
        self._sent.append((to, piece))
        if not self._is_called:
            self._is_called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # before checking for more
        while self._sent:
            to, piece = self._sent.popleft()
            to.put_nowait(piece)


def _go_on(items: Iterator[Value], found: list[Value], seconds: float) -> bool:
    """Take items for ``seconds``. True if those were all."""
    end_s = time.perf_counter() + seconds
    for item in items:
        found.append(item)
        if time.perf_counter() > end_s:
            return False
    return True
