"""A worker of `collection.dispatch`: has models of its own, and does the units that it is given, as `run` does."""

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
"""For what the model has said to be written, when nobody listens any more."""


@dataclass(frozen=True)
class Order:
    """All that a worker is told at its start, pickled. ``folder``: where paths begin that are not absolute;
    ``witness``: a path that has to be there; ``threads``: its share of the processors, None if the user chose."""

    job: Job
    known: Known
    model: Model
    work: Callable[[Callable[[Model], Any]], Work]
    folder: str
    witness: str
    threads: int | None


class Facts(dict[str, str]):
    """In the place of a journal: what is found of a model, for the one that keeps the journal."""

    def agree(self, name: str, value: str) -> None:
        self[name] = value


class Worker:
    """Loads its models at once. ``number``: which of all; ``device``: None for that of the order.

    Raises CheckpointError, and CollectionError where the files cannot be seen or another one is at work.
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
            return here.get(self.facts) if model == order.model else here.anyhow()

        self._work = order.work(get)

    def do(self, given: Iterator[Given], send: Send) -> None:
        """Tell of results by ``send``, which two threads call. Raises what ends a run."""

        def units() -> Iterator[Unit]:
            for one in given:
                if one.again:
                    self._learn(one.unit)
                yield one.unit

        def heard(unit: Unit, results: Any) -> None:
            if results is not None:
                send(Some(unit.number, results))
                return
            notes = [list(sink.notes) for sink in self._job.sinks]
            for sink in self._job.sinks:
                sink.notes.clear()
            send(Done(unit.number, notes))

        do(self._job, units(), self._known, self._work, heard)

    def _learn(self, unit: Unit) -> None:
        """What a worker did that died."""
        for result in self._job.journal.so_far(unit):
            if not (self._job.retries and result.status == FAILED):
                self._known[result.key, result.stamp] = result


def _check_there(order: Order) -> None:
    """That the images and the journal are those that the run sees, here too."""
    journal = order.job.journal
    remedy = "the images and the output have to be where all machines see them, by the same path"
    where = f"on {socket.gethostname()}; {remedy}"
    try:
        os.chdir(order.folder)
    except OSError:
        raise CollectionError(f"{order.folder}: is not there {where}") from None
    for path in (order.witness, journal.folder / "run.json"):
        if path and not os.path.exists(path):
            raise CollectionError(f"{os.path.abspath(path)}: is not there {where}")
    journal.compare(order.job.asked)


def sendable(error: BaseException) -> BaseException:
    """The same, or one that says the same, if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ---- as a process ----


def main() -> None:
    """A process that is told by standard input, and tells by standard output; it ends when its input does, which is
    when the one that gives units ends, however that ends. What the model has said is written then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    lock = threading.Lock()
    inbox: SimpleQueue[Given | None] = SimpleQueue()

    def send(message: Message) -> None:
        with lock:
            told.write(pickle.dumps(message))
            told.flush()

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
        os._exit(1)  # and nothing is printed: what went wrong was told, or nobody listens
