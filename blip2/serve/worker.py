"""The thread that owns the models: whatever computes, computes there, one thing at a time.

Requests wait in a queue, first come, first served. Each turn of the loop takes as many of them as there are rows
free, encodes those of their pictures that no one has asked about lately, reads their prompts together, and writes one
token of every running answer. So a request enters at the next token, and leaves with its last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from blip2 import threads
from blip2.api import Matcher, Pipeline
from blip2.checkpoint.reader import give_back_memory
from blip2.encoded import EncodedImage
from blip2.errors import OptionError
from blip2.generation import Batch, GenerateOptions, Hypothesis, Job
from blip2.generation.strategies import RowByRow
from blip2.serve.cache import ImageCache, Look
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.shortage import told_shortage
from blip2.tasks.match import ImageFeatures
from blip2.text import TextStream

logger = logging.getLogger("blip2.serve")

MAX_FAILURES = 3
"""So many steps that fail one after the other are the end: the device is gone, and waiting would not help."""

IDLE_S = 1.0
"""After so long with nothing to do, the memory that the work has left free goes back to the system."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Piece:
    """A piece of an answer that is being written, and the tokens that make it."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    top: list[dict[int, float]] | None = None
    """See `Hypothesis`."""


OnPiece = Callable[[Piece], None]
"""Called by the model's thread."""


class WorkerError(RuntimeError):
    """The model's thread is gone, or going."""


@dataclass(eq=False)
class Ticket:
    """One prompt on its way: what is asked, and where the answers go."""

    look: Look[EncodedImage]
    text: str
    options: GenerateOptions
    on_piece: OnPiece | None = None
    """Called with each piece of the only answer; no beams then, and ``num_return`` 1."""
    num_top: int = 0
    """So many of the most likely tokens are told at each place."""
    answers: Future[list[Hypothesis]] = field(default_factory=Future)
    num_prompt_tokens: int = 0
    """Known when the answers are; the picture's are among them."""
    is_cancelled: bool = False
    came_s: float = field(default_factory=time.monotonic)

    @property
    def num_rows(self) -> int:
        return max(self.options.num_beams, self.options.num_return)


@dataclass(frozen=True, eq=False)
class Running:
    ticket: Ticket
    job: Job
    finish_text: Callable[[], None]


class Worker:
    """See the module. ``matcher`` may be missing; `call` runs anything else on the models' thread."""

    def __init__(self, pipeline: Pipeline, matcher: Matcher | None, limits: Limits, metrics: Metrics) -> None:
        self.pipeline = pipeline
        self.matcher = matcher
        size = (limits.cache_entries, limits.cache_bytes)
        self.images: ImageCache[EncodedImage] = ImageCache(pipeline.eye, *size)
        self.features: ImageCache[ImageFeatures] | None = None
        if matcher is not None:
            self.features = ImageCache(matcher.eye, *size)
        self.max_rows = limits.max_rows
        self._metrics = metrics
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[Job, Running] = {}
        self._coming: list[Ticket] = []  # out of the queue, but not running yet
        self._fresh: list[Ticket] = []  # those of the running ones that have no token yet
        self._batch = Batch(pipeline.speaker.engine.language)
        self._num_failures = 0
        self._wake = threading.Condition()
        self._is_closing = False
        self._death: BaseException | None = None
        metrics.running.set_function(lambda: len(self._running))
        metrics.waiting.set_function(lambda: len(self._waiting) + len(self._calls))
        metrics.rows.set_function(lambda: self._batch.num_rows)
        metrics.follow_caches([self.images] if self.features is None else [self.images, self.features])
        self._thread = threading.Thread(target=self._run, name="blip2 model", daemon=True)
        self._thread.start()

    # ---- for other threads ----

    @property
    def is_alive(self) -> bool:
        return self._death is None and not self._is_closing

    @property
    def death(self) -> BaseException | None:
        """What the thread has ended of, if it was not closed."""
        return self._death

    def submit(self, ticket: Ticket) -> None:
        """Raises OptionError for more rows than there are, WorkerError if nobody works any more."""
        if ticket.num_rows > self.max_rows:
            raise OptionError(f"{ticket.num_rows} beams or answers at a time are too many; at most {self.max_rows}")
        with self._wake:
            self._check()
            self._waiting.append(ticket)
            self._wake.notify()

    def call(self, function: Callable[[], Value]) -> Future[Value]:
        """Run a function between two steps. If the future is cancelled before its turn comes, it does not run."""
        future: Future[Value] = Future()
        with self._wake:
            self._check()
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the answers any more: its rows are free at the next step. Also after the end."""
        with self._wake:
            ticket.is_cancelled = True
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        """Finish what waits and runs, for so long at most."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _check(self) -> None:
        if self._death is not None:
            raise WorkerError("the model's thread has ended; the server has to be started anew") from self._death
        if self._is_closing:
            raise WorkerError("the server is stopping")

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with threads.fitting(self.pipeline.speaker.model):
                while self._turn():
                    pass
        except BaseException as error:  # whatever it is, those who wait have to be told
            logger.critical("the model's thread has ended", exc_info=error)
            with self._wake:
                self._death = error
                tickets = [*self._waiting, *self._coming, *(running.ticket for running in self._running.values())]
                futures: list[Future[Any]] = [ticket.answers for ticket in tickets]
                futures += [future for _, future in self._calls]
                self._waiting.clear()
                self._calls.clear()
                self._running.clear()
                self._batch = Batch(self.pipeline.speaker.engine.language)
            for future in futures:
                _settle(future, error=WorkerError("the model's thread has ended; start the server anew"))

    def _turn(self) -> bool:
        """Whatever there is to do until the next token of every running answer; False: it is over."""
        with self._wake:
            idle_s: float | None = IDLE_S
            while not (self._waiting or self._calls or self._running or self._is_closing):
                if not self._wake.wait(idle_s):
                    give_back_memory()
                    idle_s = None
            if not (self._waiting or self._calls or self._running):
                return False
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)
            gone = [running for running in self._running.values() if running.ticket.is_cancelled]
        for running in gone:
            self._batch.drop(running.job)
            del self._running[running.job]
        if (called := self._next_call()) is not None:
            self._carry_out(*called)
        self._coming = self._admissible()
        if self._coming:
            self._admit(self._coming)
            self._coming = []
        if self._running:
            self._step()
        return True

    def _next_call(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with self._wake:
            return self._calls.popleft() if self._calls else None

    def _carry_out(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            with torch.inference_mode():
                result = function()
        except Exception as error:
            _settle(future, error=error)
        else:
            _settle(future, result)

    def _admissible(self) -> list[Ticket]:
        """Those at the head of the queue that there are rows for; nobody is overtaken, so nobody waits for ever."""
        free = self.max_rows - self._batch.num_rows
        tickets = []
        with self._wake:
            while self._waiting and self._waiting[0].num_rows <= free:
                tickets.append(self._waiting.popleft())
                free -= tickets[-1].num_rows
        return tickets

    def _admit(self, tickets: Sequence[Ticket]) -> None:
        images = self.images.see([ticket.look for ticket in tickets])
        coming: list[Running] = []
        for ticket, image in zip(tickets, images, strict=True):
            try:
                if isinstance(image, Exception):
                    raise image
                coming.append(self._start(ticket, image))
            except Exception as error:
                _settle(ticket.answers, error=error)
        for some in self._added(coming):
            self._running[some.job] = some
            self._fresh.append(some.ticket)
            self._metrics.tokens.labels("prompt").inc(some.ticket.num_prompt_tokens)

    def _start(self, ticket: Ticket, image: EncodedImage) -> Running:
        speaker = self.pipeline.speaker
        prompt_TD = speaker.prompt(image, ticket.text, ticket.options.max_new_tokens)
        ticket.num_prompt_tokens = len(prompt_TD)
        if ticket.on_piece is None:
            job = speaker.engine.job([prompt_TD], ticket.options, num_top=ticket.num_top)
            return Running(ticket, job, lambda: None)
        on_piece = ticket.on_piece
        text = TextStream(speaker.tokenizer)
        pending: list[int] = []
        num_told = 0

        def on_token(row: int, token: int) -> None:
            pending.append(token)
            if piece := text.push(token):
                tell(piece)

        def tell(piece: str) -> None:
            nonlocal num_told
            own = slice(num_told, num_told + len(pending))
            top = strategy.top[0][own] if ticket.num_top else None
            on_piece(Piece(piece, pending.copy(), strategy.log_probs[0][own], top))
            num_told = own.stop
            pending.clear()

        def finish_text() -> None:
            piece = text.finish()
            if piece or pending:
                tell(piece)

        job = speaker.engine.job([prompt_TD], ticket.options, on_token=on_token, num_top=ticket.num_top)
        assert isinstance(job.strategy, RowByRow)  # a search cannot be followed
        strategy: RowByRow = job.strategy
        return Running(ticket, job, finish_text)

    def _added(self, coming: list[Running]) -> Iterable[Running]:
        """Those that the batch has taken in; together if it can be, else each by itself, to find the one at fault."""
        try:
            self._batch.add([some.job for some in coming])
        except Exception as error:
            if len(coming) == 1:
                _settle(coming[0].ticket.answers, error=error)
                return []
            return [taken for some in coming for taken in self._added([some])]
        return coming

    def _step(self) -> None:
        self._metrics.batch_size.observe(self._batch.num_rows)
        try:
            over = self._batch.step()
        except Exception as error:
            if told_shortage(error) is None:
                self._num_failures += 1
            if self._num_failures == MAX_FAILURES:
                raise
            for running in self._running.values():
                _settle(running.ticket.answers, error=error)
            self._running.clear()
            self._fresh.clear()
            self._batch = Batch(self.pipeline.speaker.engine.language)
            return
        self._num_failures = 0
        now_s = time.monotonic()
        for ticket in self._fresh:
            self._metrics.first_token_seconds.observe(now_s - ticket.came_s)
        self._fresh.clear()
        for job in over:
            running = self._running.pop(job)
            try:
                [answers] = job.answers()
                running.finish_text()
            except Exception as error:
                _settle(running.ticket.answers, error=error)
                continue
            self._metrics.tokens.labels("completion").inc(sum(len(answer.tokens) for answer in answers))
            _settle(running.ticket.answers, answers)


def _settle(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    """Whoever waited may have gone away meanwhile."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(told_shortage(error) or error)
