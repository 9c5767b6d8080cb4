"""A process that parses untrusted data: requests to fields, images to pixels.

It has no torch and no model, limits on memory and processor time, and can be killed at any moment. Readers are forked
from a parent, `main`, which has imported everything they need and never parses anything itself, so a new one takes
milliseconds. See `pool` for the other side.

The parent gets commands of five bytes: "F" with a socket: fork a reader that answers there (the reply is its process
id, or a negative error number); "E" with a process id: end that reader (the reply is its wait status). When the
parent's socket is closed, it ends all of them and itself.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from blip2.errors import ImageSizeError
from blip2.image import load_image, pixels_digest, shrunk, to_array
from blip2.serve import body, frames
from blip2.serve.errors import ApiError, as_api_error
from blip2.serve.limits import Limits

MAX_REPLY_BYTES, MAX_DEPTH, MAX_MESSAGE = 2**22, 50, 1000
"""Maximum bytes of JSON in an answer, which the server parses in its event loop; and characters of an error."""
SPARE_BYTES = 256 * 2**20
"""Bytes of memory for small data."""
BYTES_PER_PIXEL = 12
BYTES_PER_BODY_BYTE = 8
CPU_S, CPU_S_PER_PIXEL = 4.0, 8e-8
"""Seconds of processor time per message, and per pixel to decode; an image of 12 million pixels takes 0.3 s here."""


class RequestParser:
    """The state of one request, from its first message to the next request's."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._images: list[str | bytes] = []
        self._do: dict[str, Callable[[dict[str, Any], bytes], frames.Message]] = {
            "read": self._read, "take": self._take, "pixels": self._pixels,
        }  # fmt: skip

    def answer(self, asked: dict[str, Any], payload: bytes) -> tuple[bytes, bytes]:
        """The reply: the JSON as packed by `frames`, and the payload."""
        try:
            reply, found = self._do[asked["do"]](asked, payload)
            _check_depth(reply, MAX_DEPTH)
            packed = frames.packed(reply, len(found))
            if len(packed) <= MAX_REPLY_BYTES:
                return packed, found
            error = ApiError(413, "body_too_large", "too large even without its images; send shorter fields")
        except MemoryError:
            error = ApiError(413, "body_too_large", "reading the request takes too much memory; send less")
        except RecursionError:
            error = ApiError(400, "too_many_values", "the JSON is nested too deeply; send less")
        except Exception as problem:
            error = as_api_error(problem)
        return frames.packed({"error": [error.status, error.code, error.message[:MAX_MESSAGE], error.param]}, 0), b""

    def _read(self, asked: dict[str, Any], content: bytes) -> frames.Message:
        found = body.read(asked["route"], asked["type"], content, self._limits)
        self._images = found.images
        return {"fields": found.fields, "pictures": [_described(image) for image in self._images]}, b""

    def _take(self, asked: dict[str, Any], content: bytes) -> frames.Message:
        """Store a downloaded image in place of its URL."""
        place = asked["picture"]
        self._images += [""] * (place + 1 - len(self._images))
        self._images[place] = content
        return _described(content), b""

    def _pixels(self, asked: dict[str, Any], _: bytes) -> frames.Message:
        """The image encoder's input for an image, float32[3, size, size], and on request a small image to show."""
        content = self._images[asked["picture"]]
        assert isinstance(content, bytes)
        try:
            image = load_image(content, max_pixels=asked["max_pixels"], allow_truncated=None)
        except ImageSizeError:
            if asked["is_last_word"]:
                raise
            return {"is_large": True}, b""
        reply = {"digest": pixels_digest(image), "num_pixels": image.width * image.height}
        pixels = to_array([image], **asked["look"]).tobytes()
        if not asked["shown_px"]:
            return reply, pixels
        small = shrunk(image, asked["shown_px"])
        return {**reply, "shown": small.size}, pixels + small.tobytes()


def _check_depth(value: Any, left: int) -> None:
    """Raises RecursionError for lists or dictionaries nested more deeply."""
    if not left:
        raise RecursionError
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, left - 1)


def _described(image: str | bytes) -> dict[str, str]:
    return {"address": image} if isinstance(image, str) else {"file": hashlib.sha256(image).hexdigest()}


def work(connection: socket.socket, limits: Limits) -> None:
    """Answer messages until the connection is closed."""
    parser = RequestParser(limits)
    with connection, connection.makefile("rb", buffering=2**16) as stream:
        while head := stream.read(frames.HEAD.size):
            num_json, num_payload = frames.lengths(head)
            asked = json.loads(stream.read(num_json))
            _bound(num_payload, asked.get("max_pixels", 0))
            reply, payload = parser.answer(asked, stream.read(num_payload))
            connection.sendall(reply)
            connection.sendall(payload)


def _bound(num_bytes: int, num_pixels: int) -> None:
    """Set the limits on memory and processor time for the next message."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + CPU_S + CPU_S_PER_PIXEL * num_pixels
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds + 1), most))
    try:
        with open("/proc/self/statm") as sizes:
            now = int(sizes.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux, where the memory limit would not work anyway
        return
    size = now + SPARE_BYTES + BYTES_PER_BODY_BYTE * num_bytes + BYTES_PER_PIXEL * num_pixels
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size if most == resource.RLIM_INFINITY else min(size, most), most))


def main() -> None:
    """The parent process. Its arguments: the descriptor of its socket, and the limits as JSON."""
    control = socket.socket(fileno=int(sys.argv[1]))
    limits = Limits(**json.loads(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server ends us by closing the socket
    with suppress(AttributeError, OSError):  # waking readers should not preempt the server
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    gc.collect()
    gc.freeze()  # garbage collection would copy the pages shared with the parent
    readers: set[int] = set()
    with suppress(ConnectionError):  # the server has exited
        while len((received := socket.recv_fds(control, frames.COMMAND.size, 1))[0]) == frames.COMMAND.size:
            command, process = frames.COMMAND.unpack(received[0])
            if command == b"F":
                answer = _forked(control, received[1][0], limits)
                readers |= {answer} if answer > 0 else set()
            else:
                answer = _end(process) if process in readers else frames.UNKNOWN
                readers.discard(process)
            control.sendall(struct.pack("<i", answer))
    for process in readers:
        _end(process)


def _forked(control: socket.socket, descriptor: int, limits: Limits) -> int:
    """The process id of a new reader that answers on a socket, or a negative error number."""
    try:
        process = os.fork()
    except OSError as error:
        process = -(error.errno or errno.EAGAIN)
    if process == 0:
        control.close()
        code = 1
        try:
            with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # if memory runs out, the kernel should kill a reader, not the model
            with suppress(ConnectionError):  # the server has exited
                work(socket.socket(fileno=descriptor), limits)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(descriptor)
    return process


def _end(process: int) -> int:
    """Kill a reader and return how it ended (see `os.waitstatus_to_exitcode`); it may have ended by itself before."""
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
