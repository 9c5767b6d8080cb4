"""A server in processes of its own, as it is run, and what it takes of the machine; who pings it and who asks it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

ROOT = Path(__file__).parents[2]
INNOCENT = "127.0.0.2"
"""Where those come from who do nothing wrong."""
HOSTS_OF_TEST = """
import functools
from blip2.serve import fetch
fetch.Fetcher = functools.partial(fetch.Fetcher, is_allowed=lambda address: True, ports=({port},))
"""
"""A server that fetches images from a port of this machine, which others never do."""
GAUGES = ("blip2_rows", *(f"blip2_requests_{name}" for name in ("running", "waiting", "in_house")))


@dataclass(frozen=True)
class Taken:
    """By all processes of a server together. Memory that they share counts once."""

    memory_mb: float
    num_files: int
    num_threads: int
    num_processes: int


@dataclass
class ServerProcess:
    """``with ServerProcess("--deadline", "3") as server``. ``fetches_from``: a port of this machine, if images are
    there. ``fault``: code that its process runs first."""

    arguments: tuple[str, ...]
    fetches_from: int | None = None
    fault: str = ""
    ready_s: float = 90
    port: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __init__(self, *arguments: str, fetches_from: int | None = None, fault: str = "", ready_s: float = 90) -> None:
        self.arguments, self.fetches_from, self.fault, self.ready_s = arguments, fetches_from, fault, ready_s

    def __enter__(self) -> ServerProcess:
        self.log = tempfile.TemporaryFile("w+")
        self.port = free_port()
        first = self.fault
        arguments = ["serve", "--port", str(self.port), *self.arguments]
        if self.fetches_from is not None:
            first += HOSTS_OF_TEST.format(port=self.fetches_from)
            arguments += ["--allow-images-from", "localhost"]
        command = ["-c", first + "\nfrom blip2.cli import main\nmain()"] if first else ["-m", "blip2"]
        self.process = subprocess.Popen(
            [sys.executable, *command, *arguments], cwd=ROOT, stdout=self.log, stderr=self.log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        end_s = time.monotonic() + self.ready_s
        while self.status("GET", "/ready") != 200:
            if self.process.poll() is not None or time.monotonic() > end_s:
                self.__exit__()
                raise AssertionError(f"the server did not start: {self.said()}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    # ---- asking ----

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "", *, timeout_s: float = 60,
        address: str = "127.0.0.1",
    ) -> tuple[int, bytes]:  # fmt: skip
        """Raises OSError, HTTPException."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s, source_address=(address, 0))
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def status(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> int:
        """0 if there is no answer."""
        try:
            return self.ask(method, path, body, kind)[0]
        except (OSError, HTTPException):
            return 0

    def metric(self, name: str) -> float:
        _, text = self.ask("GET", "/metrics", address=INNOCENT)
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text.decode(), re.MULTILINE)
        return sum(map(float, found))

    @property
    def is_idle(self) -> bool:
        return all(self.metric(name) == 0 for name in GAUGES)

    # ---- what it takes ----

    def processes(self) -> list[int]:
        """The server's own first."""
        parents: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError), open(f"/proc/{entry}/stat") as file:
                    parents.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(entry))
        found = [self.process.pid]
        for process in found:
            found += parents.get(process, [])
        return found

    def readers(self) -> list[int]:
        """The processes that read requests: forks of a parent that runs the same command."""
        return [each for each in self.processes() if _reads(each) and _reads(_parent(each))]

    def parents_of_readers(self) -> list[int]:
        return list({_parent(each) for each in self.readers()})

    def taken(self) -> Taken:
        memory_kb = num_files = num_threads = num_processes = 0
        for process in self.processes():
            with suppress(OSError):
                with open(f"/proc/{process}/smaps_rollup") as file:
                    memory_kb += sum(int(line.split()[1]) for line in file if line.startswith(OWN))
                num_files += len(os.listdir(f"/proc/{process}/fd"))
                num_threads += len(os.listdir(f"/proc/{process}/task"))
                num_processes += 1
        return Taken(memory_kb / 1024, num_files, num_threads, num_processes)

    def at_rest(self, rest: Taken, timeout_s: float = 60) -> tuple[Taken, float, str]:
        """What it takes once it is at rest again, after how many seconds, and what is not, if so."""
        began_s = time.monotonic()
        while True:
            problem, now = "", self.taken()
            try:
                if not self.is_idle:
                    problem = "requests are still unanswered"
            except (OSError, HTTPException) as error:
                problem = f"no metrics ({error})"
            for name in ("num_files", "num_processes"):
                if getattr(now, name) > getattr(rest, name):
                    problem = f"{name}: {getattr(rest, name)} before, {getattr(now, name)} now"
            if now.memory_mb > 1.1 * rest.memory_mb:
                problem = f"memory: {rest.memory_mb:.0f} MB before, {now.memory_mb:.0f} MB now"
            took_s = time.monotonic() - began_s
            if not problem or took_s > timeout_s:
                return now, took_s, problem
            time.sleep(0.25)


def _parent(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return os.getpid()


def _reads(process: int) -> bool:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return b"blip2.serve.reader" in file.read()
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


OWN = ("Pss_Anon:", "Pss_Shmem:")
"""What a process holds that is no file. Its share of libraries' files depends on who else on the machine uses them."""


class Repeated:
    """Does something again and again in a thread, and notes how long each time took. With ``pause_s`` between."""

    def __init__(self, do: Callable[[], object], pause_s: float) -> None:
        self.times_s: list[float] = []
        self.problems: list[str] = []
        self._do, self._pause_s = do, pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(self._pause_s):
            began_s = time.monotonic()
            try:
                problem = self._do()
            except (OSError, HTTPException) as error:
                problem = f"{type(error).__name__} {error}"
            self.times_s.append(time.monotonic() - began_s)
            if problem:
                self.problems.append(str(problem))

    def end(self) -> None:
        self._is_over.set()
        self._thread.join(70)


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
