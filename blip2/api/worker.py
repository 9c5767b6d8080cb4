"""A worker of `collection.dispatch`: loads its own models and processes units, as `run` does."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from blip2.collection.dispatch import Done, Failed, Given, Message, More, Ready, Some
from blip2.collection.record import FAILED, Result, Unit
from blip2.collection.run import Job, Known, Work, do
from blip2.errors import CollectionError

if TYPE_CHECKING:
    from blip2.api.collect import Model

Send = Callable[[Message], None]
END_S = 4.0
"""Seconds to write finished outcomes when the main process has gone."""


@dataclass(frozen=True)
class Order:
    """What a worker gets at its start, pickled. ``folder``: base of relative paths. ``sample_path``: a path that has to
    exist. ``threads``: its share of the processors; None if the user set the number."""

    job: Job
    known: Known
    model: Model
    work: Callable[[Callable[[Model], Any]], Work]
    folder: str
    sample_path: str
    threads: int | None


class Facts(dict[str, str]):
    """Replaces the journal: collects facts about the model for the process that keeps the journal."""

    def agree(self, name: str, value: str) -> None:
        self[name] = value


class Worker:
    """Loads its models at once. ``number``: which worker it is. ``device``: None for that of the order.

    Raises CheckpointError, and CollectionError if the files are not visible or another worker is running.
    """

    def __init__(self, order: Order, number: int, device: str | None) -> None:
        self._job = order.job
        self._known: dict[tuple[str, str], Result] = dict(order.known)
        _check_there(order)
        if order.threads is not None:
            torch.set_num_threads(order.threads)
        self._held = ExitStack()  # until the process ends
        self._held.enter_context(self._job.journal.helped(self._job.shard, number))
        self.facts = Facts()

        def get(model: Model) -> Any:
            here = model if device is None else replace(model, options={**model.options, "device": device})
            return here.get(self.facts) if model == order.model else here.load_unchecked()

        self._work = order.work(get)

    def do(self, given: Iterator[Given], send: Send) -> None:
        """Process units and report results with ``send``, which two threads call. Raises errors that end a run."""

        def units() -> Iterator[Unit]:
            for one in given:
                if one.again:
                    self._learn(one.unit)
                yield one.unit

        def report(unit: Unit, results: Any) -> None:
            if results is not None:
                send(Some(unit.number, results))
                return
            notes = [list(sink.notes) for sink in self._job.sinks]
            for sink in self._job.sinks:
                sink.notes.clear()
            send(Done(unit.number, notes))

        do(self._job, units(), self._known, self._work, report)

    def _learn(self, unit: Unit) -> None:
        """Read the results of a worker that died during this unit."""
        for result in self._job.journal.so_far(unit):
            if not (self._job.retries and result.status == FAILED):
                self._known[result.key, result.stamp] = result


def _check_there(order: Order) -> None:
    """Check that the images and the journal of the run are visible here."""
    journal = order.job.journal
    remedy = "all machines have to see the images and the output under the same path"
    where = f"on {socket.gethostname()}; {remedy}"
    try:
        os.chdir(order.folder)
    except OSError:
        raise CollectionError(f"{order.folder}: does not exist {where}") from None
    for path in (order.sample_path, journal.folder / "run.json"):
        if path and not os.path.exists(path):
            raise CollectionError(f"{os.path.abspath(path)}: does not exist {where}")
    journal.compare(order.job.asked)


def sendable(error: BaseException) -> BaseException:
    """The error itself, or one with the same message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ---- worker process ----


def main() -> None:
    """A process that receives messages on standard input and sends them on standard output. It ends when its input
    does, that is, when the main process ends for any reason. Finished outcomes are written then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # redirects what libraries print
    lock = threading.Lock()
    inbox: SimpleQueue[Given | None] = SimpleQueue()

    def send(message: Message) -> None:
        with lock:
            messages.write(pickle.dumps(message))
            messages.flush()

    def listen() -> None:
        while True:
            try:
                inbox.put(pickle.load(sys.stdin.buffer))
            except BaseException:
                break
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(END_S)
        os._exit(1)

    def given(first: Given) -> Iterator[Given]:
        following: Given | None = first
        while following is not None:
            yield following
            send(More(is_idle=False))
            following = inbox.get()

    try:
        try:
            number, device = pickle.load(sys.stdin.buffer)
            order = pickle.load(sys.stdin.buffer)
            threading.Thread(target=listen, daemon=True).start()
            worker = Worker(order, number, device)
            send(Ready(worker.facts))
            while True:
                send(More(is_idle=True))
                first = inbox.get()
                assert first is not None
                worker.do(given(first), send)
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            send(Failed(sendable(error)))
    finally:
        os._exit(1)  # print nothing: the error was sent, or nobody is listening
