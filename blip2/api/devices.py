"""Workers as processes on this machine, each with its models on a separate device."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from blip2.collection.dispatch import Died, Given, Message

END_S = 5.0
"""Seconds for a process to end after its input has ended."""


class Processes:
    """`dispatch.Workers` as processes. ``order``: a pickled `worker.Order`. Not `multiprocessing`, which would run the
    calling program again in each process."""

    def __init__(self, order: bytes, devices: Sequence[str]) -> None:
        self.number = len(devices)
        self._order = order
        self._devices = devices
        self._messages: SimpleQueue[tuple[int, Message]] = SimpleQueue()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, worker: int) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from blip2.api.worker import main; main()"
        apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is only for this process
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart
        )  # fmt: skip
        self._processes[worker] = process
        Thread(target=self._listen, args=(worker, process), daemon=True).start()

    def give(self, worker: int, given: Given | None) -> None:
        with suppress(OSError, ValueError):  # a dead worker is noticed elsewhere
            self._send(self._processes[worker], pickle.dumps(given))

    def receive(self) -> tuple[int, Message]:
        while True:
            with suppress(Empty):
                return self._messages.get(timeout=1)  # so that Ctrl-C works on every system

    def close(self) -> None:
        for process in self._processes.values():
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for process in self._processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _listen(self, worker: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with suppress(OSError, ValueError):  # it has died or was ended meanwhile
            self._send(process, pickle.dumps((worker, self._devices[worker])) + self._order)
        while True:
            try:
                self._messages.put((worker, pickle.load(process.stdout)))
            except Exception:  # end of output, perhaps in the middle of a message
                break
        process.stdout.close()
        self._messages.put((worker, Died(_reason(process.wait()))))

    @staticmethod
    def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(message)
        process.stdin.flush()


def _reason(code: int) -> str:
    if code >= 0:
        return f"it ended with code {code}"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
    return f"signal {-code}"


