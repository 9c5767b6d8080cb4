"""The processes that read requests and pictures, as the server sees them.

A request has a reader to itself, for as long as it is read; requests that wait for one take turns (`Turns`). Who takes
longer than `FAST_S` leaves the fast lane: his reader becomes a background process, another takes its place, and of
those in the slow lane there are a few at most: beyond, the one that has taken longest is ended. A request that ends in
the middle (its time is up, its client is gone) takes its reader with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2.serve import frames
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.turns import Handout

logger = logging.getLogger("blip2.serve")

PARENT = "from blip2.serve.reader import main; main()"
NUM_FAST, MAX_SLOW = 2, 4
FAST_S = 0.25
BACKGROUND = 10
"""How nice a slow reader is to the others: a tenth of a processor where the model wants all of them."""
COMMAND = struct.Struct("<ci")


class Reader:
    """One process. A message is answered before the next one is sent."""

    def __init__(self, process: int, connection: socket.socket) -> None:
        self.process = process
        self.is_slow = False
        self.is_asked = False
        """Whether it owes an answer, so that it can be used no further if that is not waited for."""
        self.is_worn = False
        """Whether it is better replaced after this request, since it holds much memory."""
        self.began_s = 0.0
        self.client = ""
        self.refusal: ApiError | None = None
        """Why it was ended, if we did it."""
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def ask(self, asked: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """Its answer. Raises ApiError for what it says is wrong with the request, ConnectionError if it has ended."""
        self.is_asked = True
        await self._loop.sock_sendall(self._connection, frames.packed(asked, len(payload)))
        if payload:
            await self._loop.sock_sendall(self._connection, payload)
        num_json, num_payload = frames.lengths(await self._receive(frames.HEAD.size))
        told = json.loads(await self._receive(num_json))
        content = await self._receive(num_payload)
        self.is_asked = False
        if "error" in told:
            status, code, message, param = told["error"]
            raise ApiError(status, code, message, param=param)
        return told, content

    async def _receive(self, number: int) -> bytearray:
        content = bytearray(number)
        view, have = memoryview(content), 0
        while have < number:
            got = await self._loop.sock_recv_into(self._connection, view[have:])
            if not got:
                raise ConnectionError("the reader has ended")
            have += got
        return content

    def close(self) -> None:
        self._connection.close()


class Pool:
    """``start`` before anything else, in the event loop that uses it; ``close`` may be called from anywhere, once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.parent: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._speaking = asyncio.Lock()
        self._readers: set[Reader] = set()
        self._num_coming = 0
        self._fast: Handout[Reader] = Handout()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def processes(self) -> list[int]:
        return [reader.process for reader in self._readers]

    @property
    def num_waiting(self) -> int:
        return self._fast.num_waiting

    def start(self) -> None:
        self._launch()
        self._fill()

    def close(self) -> None:
        """Ends all readers at once, whatever they do."""
        self._is_closed = True
        if self._control is not None:
            self._control.close()  # the parent ends its readers, and itself
        if self.parent is not None:
            self.parent.poll()
        for reader in self._readers:
            with suppress(ProcessLookupError):
                os.kill(reader.process, signal.SIGKILL)
            reader.close()

    @asynccontextmanager
    async def reader(self, client: str, size: float) -> AsyncIterator[Reader]:
        """A reader of one's own. ``size``: of a client's requests the smaller are read first.

        Raises ApiError if the reader ends: for its time, its memory, or a fault in a decoder.
        """
        reader = await self._fast.take(client, size)
        reader.client, reader.began_s = client, time.monotonic()
        demotion = asyncio.get_running_loop().call_later(FAST_S, self._demote, reader)
        try:
            yield reader
        except (ConnectionError, ValueError) as error:
            if reader.is_asked:
                raise reader.refusal or await self._reason(reader) from error
            raise
        finally:
            demotion.cancel()
            self._give_back(reader)

    # ---- which ----

    def _give_back(self, reader: Reader) -> None:
        if reader in self._readers:
            if reader.is_asked or reader.is_slow or reader.is_worn:
                self._end_soon(reader)
            else:
                self._fast.offer(reader)

    def _demote(self, reader: Reader) -> None:
        if reader not in self._readers:
            return
        reader.is_slow = True
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, reader.process, BACKGROUND)
        slow = [each for each in self._readers if each.is_slow]
        if len(slow) > MAX_SLOW:
            num_of_client = {each.client: sum(other.client == each.client for other in slow) for each in slow}
            longest = max(slow, key=lambda each: (num_of_client[each.client], -each.began_s))
            longest.refusal = ApiError(
                503, "busy", "the server is reading too many large requests; try again in a moment", 
                headers={"Retry-After": "2"},
            )  # fmt: skip
            self._end_soon(longest)
        self._fill()

    # ---- their lives ----

    def _fill(self) -> None:
        """As many readers in the fast lane as there are to be."""
        num_fast = sum(not reader.is_slow for reader in self._readers) + self._num_coming
        for _ in range(NUM_FAST - num_fast):
            self._num_coming += 1
            self._later(self._begin())

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self) -> None:
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                ours.setblocking(False)
                process = await self._tell(b"F", 0, [theirs.fileno()])
            reader = Reader(process, ours)
            self._readers.add(reader)
        except OSError as error:
            if not self._is_closed:
                logger.error("no process to read requests can be started: %s", error)
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
            return await self._tell(b"E", reader.process)
        except OSError:
            return 0
        finally:
            reader.close()  # only now: whoever waits for its answer is woken by its end

    async def _reason(self, reader: Reader) -> ApiError:
        """Why a reader has ended by itself, for the client whose request it was."""
        self._readers.discard(reader)
        code = await self._end(reader)
        self._fill()
        if code == -signal.SIGXCPU:
            message = "to read this takes too much processor time; send a smaller request, or save the picture again"
            return ApiError(400, "too_slow", message, param="image")
        logger.warning("a process that read a request has ended (%s)", code)
        message = "the picture cannot be decoded: its decoder broke down; save it again"
        return ApiError(400, "invalid_image", message, param="image")

    # ---- their parent ----

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.parent = subprocess.Popen(
                [sys.executable, "-c", PARENT, str(theirs.fileno()), json.dumps(asdict(self._limits))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
                    ),
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_NUM_THREADS": "1",
                },
                start_new_session=True,  # a Ctrl-C in the terminal is for the server alone
            )
        ours.setblocking(False)
        self._control = ours

    async def _tell(self, command: bytes, process: int, descriptors: list[int] = []) -> int:  # noqa: B006
        """What the parent answers. If it is gone, another is started, which knows nothing of the readers there were."""
        loop = asyncio.get_running_loop()
        async with self._speaking:
            for attempt in range(2):
                try:
                    assert self._control is not None
                    if descriptors:
                        socket.send_fds(self._control, [COMMAND.pack(command, process)], descriptors)
                    else:
                        await loop.sock_sendall(self._control, COMMAND.pack(command, process))
                    answer = await loop.sock_recv(self._control, 4)
                    if len(answer) < 4:
                        raise ConnectionError("the parent of the readers has ended")
                    return int(struct.unpack("<i", answer)[0])
                except OSError:
                    if attempt or self._is_closed:
                        raise
                    self._relaunch()
        raise AssertionError

    def _relaunch(self) -> None:
        logger.error("the parent of the processes that read requests has ended; another is started")
        if self._control is not None:
            self._control.close()
        self._launch()
