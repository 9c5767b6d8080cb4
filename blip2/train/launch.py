"""Starts the processes of one training on this machine, as ``torchrun`` does, and ends all of them if one fails.

Each process runs ``blip2 train`` with the environment variables of ``torchrun``. Each has its own session, so Ctrl-C
reaches only the launcher, which forwards it once.
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
"""Time in which the others can save their state after one process has failed; then they are killed."""
STOPPED = 130
"""Exit code of a training that was stopped by a signal and has saved its state."""


def launch(arguments: Sequence[str], devices: int) -> int:
    """Run ``blip2`` with these arguments in ``devices`` processes. Returns the exit code; its cause has been printed.

    Raises Blip2Error, with the rank, for a process that ended without a message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices), LAUNCHED: "1",
    }  # fmt: skip
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine can connect, and no host name is needed
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "blip2", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,  # its end tells the processes that the launcher has ended
            start_new_session=True,
        )
        for rank in range(devices)
    ]
    try:
        with _forwarding_signals(processes):
            return _watch(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all processes have ended, or until one has failed and the others had time to end."""
    while not any(process.poll() for process in processes):
        if all(process.poll() == 0 for process in processes):
            return 0
        time.sleep(0.05)
    time.sleep(1)  # the others notice by themselves and save a newer state
    codes = [process.poll() for process in processes]
    if STOPPED not in codes:  # else all of them are about to end
        _signal(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            raise Blip2Error(
                f"process {rank} of {len(codes)} was killed by signal {-code} ({signal.strsignal(-code)}), and the "
                "others were stopped; start the same command again to resume from the last state"
            )
    return next(code for code in codes if code)


@contextmanager
def _forwarding_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forward SIGINT and SIGTERM to all processes, which save their state together and end."""
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
