"""The thread that owns the models: all computation happens there, one step at a time.

Requests wait in a queue with turns for clients, until rows are free (`lanes`). A turn of the loop is one of these:
admit some requests that have rows, encode their images unless cached, and prefill their prompts as a batch; or generate
one more token for every running answer of a lane; or run a portion of other work (`Worker.call`). So a request enters
at the next token, leaves with its last, and none delays another for longer than a turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

import torch

from blip2 import threads
from blip2.api import Matcher, Pipeline
from blip2.checkpoint.reader import release_memory
from blip2.encoded import EncodedImage
from blip2.errors import OptionError
from blip2.generation import Batch
from blip2.serve.cache import ImageCache
from blip2.serve.lanes import PORTION, Lane, Lanes, Share, next_of
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.shortage import shortage_error
from blip2.serve.tickets import Call, Running, Steps, Ticket, begun
from blip2.serve.turns import Turns
from blip2.tasks.match import ImageFeatures

logger = logging.getLogger("blip2.serve")

MAX_FAILURES = 3
"""Consecutive failed steps after which the thread ends: the device is lost, and waiting would not help."""

IDLE_S = 1.0
"""Idle seconds after which freed memory is returned to the system."""

Value = TypeVar("Value")


class WorkerError(RuntimeError):
    """The models' thread has ended, or is ending."""


class Worker:
    """See the module. ``matcher`` may be None. `call` runs other work on the models' thread."""

    def __init__(self, pipeline: Pipeline, matcher: Matcher | None, limits: Limits, metrics: Metrics) -> None:
        self.pipeline = pipeline
        self.matcher = matcher
        size = (limits.cache_entries, limits.cache_bytes)
        self.images: ImageCache[EncodedImage] = ImageCache(pipeline.frontend, *size)
        self.features: ImageCache[ImageFeatures] | None = None
        if matcher is not None:
            self.features = ImageCache(matcher.frontend, *size)
        self.max_rows = limits.max_rows
        self._metrics = metrics
        self._waiting: Turns[Ticket] = Turns()
        self._calls: Turns[Call[Any]] = Turns()
        self._lanes = Lanes(pipeline.speaker.engine.language, limits.max_rows)
        self._calling = Share(1)
        self._shares = (*self._lanes.each, self._calling)
        self._coming: list[Ticket] = []  # being admitted
        self._is_changed = False  # waiting tickets or free rows have changed
        self._num_failures = 0
        self._wake = threading.Condition()
        self._is_closing = False
        self._death: BaseException | None = None
        lanes = self._lanes.each
        metrics.running.set_function(lambda: sum(len(lane.running) for lane in lanes))
        metrics.waiting.set_function(
            lambda: len(self._waiting) + len(self._calls) + sum(len(lane.coming) for lane in lanes)
        )
        metrics.rows.set_function(lambda: sum(lane.batch.num_rows for lane in lanes))
        metrics.follow_caches([self.images] if self.features is None else [self.images, self.features])
        self._thread = threading.Thread(target=self._run, name="blip2 model", daemon=True)
        self._thread.start()

    # ---- called by other threads ----

    @property
    def is_alive(self) -> bool:
        return self._death is None and not self._is_closing

    @property
    def death(self) -> BaseException | None:
        """The error that ended the thread, if it was not closed."""
        return self._death

    def submit(self, ticket: Ticket) -> None:
        """Raises OptionError for more rows than there are, WorkerError if the thread has ended."""
        if ticket.num_rows > self.max_rows:
            raise OptionError(f"{ticket.num_rows} beams or answers at once are too many; at most {self.max_rows}")
        with self._wake:
            self._check()
            self._waiting.push(ticket.client, ticket)
            self._is_changed = True
            self._wake.notify()

    def call(self, client: str, steps: Steps[Value]) -> Future[Value]:
        """Run work in portions, in turn with everything else. Cancelling the future stops it."""
        call = Call(steps, client)
        with self._wake:
            self._check()
            self._calls.push(client, call)
            self._wake.notify()
        call.result.add_done_callback(lambda _: self._note_change())
        return call.result

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a ticket: its rows are free at the next step. May also be called after its end."""
        with self._wake:
            ticket.is_cancelled = True
            self._is_changed = True
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        """Finish waiting and running work, within ``timeout_s``."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _note_change(self) -> None:
        self._is_changed = True

    def _check(self) -> None:
        if self._death is not None:
            raise WorkerError("the model's thread has ended; the server has to be restarted") from self._death
        if self._is_closing:
            raise WorkerError("the server is stopping")

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with threads.fitting(self.pipeline.speaker.model):
                while self._turn():
                    pass
        except BaseException as error:  # any error has to be reported to waiting clients
            logger.critical("the model's thread has ended", exc_info=error)
            with self._wake:
                self._death = error
                tickets = [*self._waiting, *self._coming, *self._lanes.tickets]
                futures: list[Future[Any]] = [ticket.answers for ticket in tickets]
                futures += [call.result for call in self._calls]
                self._waiting, self._calls = Turns(), Turns()
                for lane in self._lanes.each:
                    lane.coming.clear()
                    lane.clear()
            for future in futures:
                _settle(future, error=WorkerError("the model's thread has ended; restart the server"))

    def _turn(self) -> bool:
        """Run the next portion of work. False: closed, and nothing is left."""
        with self._wake:
            idle_s: float | None = IDLE_S
            while not (self._has_work() or self._is_closing):
                if not self._wake.wait(idle_s):
                    release_memory()
                    idle_s = None
            if not self._has_work():
                return False
        if self._is_changed:
            self._is_changed = False
            self._rearrange()
        busy: list[Share] = [lane for lane in self._lanes.each if lane.is_busy]
        busy += [self._calling] * bool(len(self._calls))
        if not busy:
            return True
        share = next_of(self._shares, busy)
        began_s = time.perf_counter()
        if not isinstance(share, Lane):
            self._carry_on()
        elif share.coming and (share.may_admit or not share.running):
            self._coming = share.portion(min(PORTION, self.pipeline.frontend.images_at_a_time))
            self._admit(share, [ticket for ticket in self._coming if not ticket.is_cancelled])
            self._coming = []
            share.may_admit = len(busy) == 1  # admitting together is faster
        else:
            self._step(share)
            share.may_admit = True
        share.spent_s += (time.perf_counter() - began_s) / share.weight
        return True

    def _has_work(self) -> bool:
        return bool(len(self._waiting) or len(self._calls) or self._lanes.is_busy)

    def _rearrange(self) -> None:
        """Free the rows of finished and cancelled tickets, and give them to waiting ones."""
        for lane in self._lanes.each:
            for running in [running for running in lane.running.values() if running.ticket.is_cancelled]:
                lane.batch.drop(running.job)
                del lane.running[running.job]
        with self._wake:
            for ticket in self._waiting:
                if ticket.is_cancelled:
                    self._waiting.remove(ticket)
            calls = [call for call in self._calls if call.result.cancelled()]
            for call in calls:
                self._calls.remove(call)
            self._lanes.allot(self._waiting)
        for call in calls:
            call.steps.close()

    def _carry_on(self) -> None:
        """Run a portion of a call: the one in progress of the client whose turn it is."""
        with self._wake:
            call = self._calls.pop()
            self._calls.push(call.client, call, -1)
        result, error = None, None
        try:
            with torch.inference_mode():
                next(call.steps)
            return
        except StopIteration as end:
            result = end.value
        except Exception as problem:
            error = problem
        with self._wake:
            self._calls.remove(call)
        _settle(call.result, result, error=error)

    def _admit(self, lane: Lane, tickets: Sequence[Ticket]) -> None:
        images = self.images.see([ticket.look for ticket in tickets])
        coming: list[Running] = []
        for ticket, image in zip(tickets, images, strict=True):
            try:
                if isinstance(image, Exception):
                    raise image
                coming.append(begun(ticket, image, self.pipeline.speaker))
            except Exception as error:
                _settle(ticket.answers, error=error)
        for some in self._added(lane, coming):
            lane.running[some.job] = some
            lane.fresh.append(some.ticket)
            self._metrics.tokens.labels("prompt").inc(some.ticket.num_prompt_tokens)

    def _added(self, lane: Lane, coming: list[Running]) -> Iterable[Running]:
        """The tickets that the batch has admitted; as a group, or else one by one, to find the faulty one."""
        try:
            lane.batch.add([some.job for some in coming])
        except Exception as error:
            if len(coming) == 1:
                _settle(coming[0].ticket.answers, error=error)
                return []
            return [taken for some in coming for taken in self._added(lane, [some])]
        return coming

    def _step(self, lane: Lane) -> None:
        batch: Batch = lane.batch
        num_rows = batch.num_rows
        self._metrics.batch_size.observe(num_rows)
        try:
            over = batch.step()
        except Exception as error:
            if shortage_error(error) is None:
                self._num_failures += 1
            if self._num_failures == MAX_FAILURES:
                raise
            for running in lane.running.values():
                _settle(running.ticket.answers, error=error)
            lane.clear()
            self._is_changed = True
            return
        self._num_failures = 0
        now_s = time.monotonic()
        for ticket in lane.fresh:
            self._metrics.first_token_seconds.observe(now_s - ticket.arrived_s)
        lane.fresh.clear()
        self._is_changed |= batch.num_rows < num_rows
        for job in over:
            running = lane.running.pop(job)
            try:
                [answers] = job.answers()
                running.finish_text()
            except Exception as error:
                _settle(running.ticket.answers, error=error)
                continue
            self._metrics.tokens.labels("completion").inc(sum(len(answer.tokens) for answer in answers))
            _settle(running.ticket.answers, answers)


def _settle(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    """The waiting client may have disconnected meanwhile."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(shortage_error(error) or error)
