"""Starts the processes of one training on this machine, as ``torchrun`` does, and ends them all if one fails.

Each is ``blip2 train`` with the names of ``torchrun`` in its environment. They are in sessions of their own: Ctrl-C
reaches this process alone, which hands it on once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from blip2.errors import Blip2Error
from blip2.train.group import LAUNCHED

GRACE_S = 120.0
"""For saving the state, once another process has failed; then they are killed."""
STOPPED = 130
"""The exit code of a training that was stopped by a signal, and has saved its state."""


def launch(arguments: Sequence[str], devices: int) -> int:
    """Run ``blip2`` with these arguments in so many processes; returns the exit code, of which the cause was told.

    Raises Blip2Error for a process that ended without a word, naming it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices), LAUNCHED: "1",
    }  # fmt: skip
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else can connect, and no name has to be known
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "blip2", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,  # whose end tells that this process is gone
            start_new_session=True,
        )
        for rank in range(devices)
    ]
    try:
        with _handed_on(processes):
            return _watch(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the others had time to end."""
    while not any(process.poll() for process in processes):
        if all(process.poll() == 0 for process in processes):
            return 0
        time.sleep(0.05)
    time.sleep(1)  # the others find out by themselves; what they save then is the newest
    codes = [process.poll() for process in processes]
    if STOPPED not in codes:  # else all of them are about to end
        _signal(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            raise Blip2Error(
                f"process {rank} of {len(codes)} was ended by signal {-code} ({signal.strsignal(-code)}), and with it "
                "the others; start the same again to go on from the last state"
            )
    return next(code for code in codes if code)


@contextmanager
def _handed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM go to all processes, which save their state together and end."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: _signal(processes, number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(number)
