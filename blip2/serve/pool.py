"""The pool of reader processes, which parse requests and decode images.

A request has a reader of its own while it is parsed; waiting requests take turns (`Turns`). A request whose reader uses
more than `FAST_S` of processor time leaves the fast lane: its reader gets background priority, and a new one replaces
it. There are only a few slow readers: with one more, the longest-running one is ended, except for large images, which
have waited for their turn. A request that ends early (deadline, disconnect) ends its reader.
"""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any, TypeVar

from blip2.serve import frames
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.reader_link import Reader
from blip2.serve.turns import ReservingPool

logger = logging.getLogger("blip2.serve")

Value = TypeVar("Value")

PATH = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
PARENT = "from blip2.serve.reader import main; main()"
NUM_FAST, MAX_SLOW = 3, 8
"""Numbers of fast readers, one of them reserved for a client that has none so that it is served at once, and slow
ones."""
FAST_S = 0.1
"""Seconds of processor time; waiting does not count."""
END_S = 0.5
"""Seconds for the parent to end."""
BACKGROUND = 10
"""Nice value of a slow reader: it gets a tenth of a processor if the model wants all of them."""
MAX_GROWTH_BYTES = 3 * 2**20
"""Bytes of memory beyond those of a new reader, from which one is replaced, as is one that was slow."""
PAGE_BYTES = mmap.PAGESIZE
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",  # glibc: large blocks return to the system when freed
    "MALLOC_TRIM_THRESHOLD_": "1048576",
}
KILLED = "reader_killed"
"""The code of an error that says nothing about the request, which another reader may retry."""


class Pool:
    """Call ``start`` first, in the event loop that uses the pool. ``close`` may be called from any thread, once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.parent: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._speaking = asyncio.Lock()
        self._readers: set[Reader] = set()
        self._num_coming = 0
        self._fast: ReservingPool[Reader] = ReservingPool()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    @property
    def processes(self) -> list[int]:
        return [reader.process for reader in self._readers]

    def start(self) -> None:
        self._launch()
        self._fill()

    def close(self) -> None:
        """End all readers at once, whatever they do."""
        self._is_closed = True
        if self._control is not None:
            self._control.close()  # the parent ends its readers and itself
        for reader in self._readers:
            with suppress(ProcessLookupError):
                os.kill(reader.process, signal.SIGKILL)
            reader.close()
        if self.parent is not None:
            try:
                self.parent.wait(END_S)
            except subprocess.TimeoutExpired:  # it is still starting, and has no readers
                self.parent.kill()
                self.parent.wait()

    @asynccontextmanager
    async def reader(self, client: str, size: float) -> AsyncIterator[Reader]:
        """A reader for one request. ``size``: smaller requests of a client are read first."""
        while (reader := await self._fast.take(client, size)).has_ended:
            self._end_soon(reader)  # it was killed while it was idle
        reader.client, reader.began_s = client, processor_s(reader.process)
        self._watch(reader, FAST_S)
        try:
            yield reader
        finally:
            reader.watch.cancel()
            self._return(reader)

    # ---- lanes ----

    def _return(self, reader: Reader) -> None:
        if reader in self._readers:
            reader.is_grown |= memory_of(reader.process) - reader.new_bytes > MAX_GROWTH_BYTES
            if reader.is_asked or reader.is_slow or reader.is_grown:
                self._end_soon(reader)
            else:
                self._fast.offer(reader)

    def _watch(self, reader: Reader, left_s: float) -> None:
        reader.watch = asyncio.get_running_loop().call_later(max(left_s, 0.05), self._look_after, reader)

    def _look_after(self, reader: Reader) -> None:
        used_s = processor_s(reader.process) - reader.began_s
        if used_s < FAST_S:
            self._watch(reader, FAST_S - used_s)
        elif not reader.is_slow:
            self.demote(reader)

    def demote(self, reader: Reader, *, is_expected: bool = False) -> None:
        """Move a reader out of the fast lane. ``is_expected``: its request has waited for this, so others cannot end
        it."""
        if reader not in self._readers:
            return
        reader.is_slow, reader.is_expected = True, is_expected
        self._fast.forget(reader)
        put_back(reader.process)
        slow = [each for each in self._readers if each.is_slow and not each.is_expected]
        if len(slow) > MAX_SLOW:
            number = Counter(each.client for each in slow)
            longest = max(slow, key=lambda each: (number[each.client], processor_s(each.process) - each.began_s))
            longest.refusal = ApiError(
                503, "busy", "the server is reading too many slow requests; try again in a moment",
                headers={"Retry-After": "2"},
            )  # fmt: skip
            self._end_soon(longest)
        self._fill()

    # ---- starting and ending ----

    def _fill(self) -> None:
        """Start readers until the fast lane is full."""
        num_fast = sum(not reader.is_slow for reader in self._readers) + self._num_coming
        for _ in range(NUM_FAST - num_fast):
            self._num_coming += 1
            self._later(self._begin())

    def _later(self, work: Coroutine[Any, Any, Value]) -> asyncio.Task[Value]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _begin(self) -> None:
        try:
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    process = await self._send(b"F", 0, [theirs.fileno()])
                if process < 0:
                    raise OSError(-process, os.strerror(-process))
                reader = Reader(process, self._why_ended)
                reader.new_bytes = memory_of(process)
                await asyncio.get_running_loop().create_unix_connection(lambda: reader, sock=ours)
            except BaseException:
                ours.close()
                raise
            self._readers.add(reader)
        except OSError as error:
            if not self._is_closed:
                logger.error("cannot start a process that reads requests: %s", error)
                await asyncio.sleep(1)
                asyncio.get_running_loop().call_soon(self._fill)
            return
        finally:
            self._num_coming -= 1
        self._fast.offer(reader)

    def _end_soon(self, reader: Reader) -> None:
        self._readers.discard(reader)
        self._fast.withdraw(reader)
        self._later(self._end(reader))
        self._fill()

    async def _end(self, reader: Reader) -> int:
        try:
            code = await self._send(b"E", reader.process)
            if code == frames.UNKNOWN:
                self._kill_orphan(reader)
            return code
        except OSError:
            return frames.UNKNOWN
        finally:
            reader.close()  # only now: closing wakes whoever waits for its answer

    async def _why_ended(self, reader: Reader) -> ApiError:
        """Why a reader has ended by itself, for the client of its request."""
        self._readers.discard(reader)
        self._fill()
        # The client may disconnect, but the parent's answer has to be received completely.
        code = await asyncio.shield(self._later(self._end(reader)))
        if code == -signal.SIGXCPU:
            message = "reading this takes too much processor time; send a smaller request, or save the image again"
            return ApiError(400, "too_slow", message, param="image")
        logger.warning("a process that was reading a request has ended (%s)", code)
        if code in (-signal.SIGKILL, frames.UNKNOWN):
            message = "the process reading the request was killed, perhaps for lack of memory; send it again"
            return ApiError(503, KILLED, message, headers={"Retry-After": "1"})
        message = "the image cannot be decoded: its decoder crashed; save it again"
        return ApiError(400, "invalid_image", message, param="image")

    # ---- the parent of the readers ----

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            limits = json.dumps(asdict(self._limits))
            path = json.dumps([os.path.abspath(folder) for folder in sys.path])  # the same path as in the server
            self.parent = subprocess.Popen(
                [sys.executable, "-P", "-c", PATH + PARENT, str(theirs.fileno()), limits, path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in the terminal is only for the server
            )
        ours.setblocking(False)
        self._control = ours

    async def _send(self, command: bytes, process: int, descriptors: list[int] = []) -> int:  # noqa: B006
        """The parent's answer to a command. If the parent has died, another one is started, and all readers with it.

        Must not be cancelled: the answer would be taken for that to the next command.
        """
        loop = asyncio.get_running_loop()
        async with self._speaking:
            for attempt in range(2):
                try:
                    assert self._control is not None
                    if descriptors:
                        socket.send_fds(self._control, [frames.COMMAND.pack(command, process)], descriptors)
                    else:
                        await loop.sock_sendall(self._control, frames.COMMAND.pack(command, process))
                    answer = await loop.sock_recv(self._control, 4)
                    if len(answer) < 4:
                        raise ConnectionError("the parent of the readers has died")
                    return int(struct.unpack("<i", answer)[0])
                except OSError:
                    if attempt or self._is_closed:
                        raise
                    self._relaunch()
        raise AssertionError

    def _relaunch(self) -> None:
        logger.error("the parent of the processes that read requests has died; starting another")
        if self._control is not None:
            self._control.close()
        for reader in self._readers:
            self._kill_orphan(reader)
        self._launch()

    @staticmethod
    def _kill_orphan(reader: Reader) -> None:
        """Kill a reader whose parent has died, since nobody else would."""
        with suppress(ProcessLookupError):
            os.kill(reader.process, signal.SIGKILL)


def put_back(process: int) -> None:
    """Give a process and its threads background priority."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task") if sys.platform == "linux" else [process]:
            os.setpriority(os.PRIO_PROCESS, int(thread), BACKGROUND)


def processor_s(process: int) -> float:
    """The processor time of another process in seconds. Where the system does not report it, the elapsed time."""
    try:
        return time.clock_gettime(~process << 3 | 2)  # Linux's number for the clock of a process
    except (OSError, OverflowError):
        return time.monotonic()


def memory_of(process: int) -> int:
    """The private and inherited memory of another process in bytes. Where the system does not report it, 0."""
    try:
        with open(f"/proc/{process}/statm") as sizes:
            _, resident, of_files, *_ = map(int, sizes.read().split())
    except OSError:
        return 0
    return (resident - of_files) * PAGE_BYTES
