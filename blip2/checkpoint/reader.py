"""Tensors from safetensors files, each read directly into its own memory.

The library's memory map is not used: its pages would count as memory of this process, up to the size of the file, and
reading by page faults is slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.files import INDEX, WEIGHTS, pickled_files, weight_files
from blip2.checkpoint.pickled import unpickled
from blip2.errors import CheckpointError
from blip2.tensorfile import read_header

RUN_BYTES = 2**23
NUM_READERS = 4
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Place:
    """The place of a tensor: ``start`` and ``num_bytes`` in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """The tensor. Raises `CheckpointError` if the file was truncated since it was opened, or cannot be read."""
        return read([self])


@dataclass(frozen=True)
class Unpickled(Place):
    """A tensor of a .bin file, in the memory map of the file."""

    tensor: Tensor

    @classmethod
    def of(cls, path: Path, tensor: Tensor) -> Unpickled:
        return cls(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, tensor)

    def read(self) -> Tensor:
        return self.tensor.clone()


def find_tensors(folder: Path, *, pickles: bool = False) -> dict[str, Place]:
    """Every tensor of the model in a folder; with ``pickles`` those of .bin files, if there are only these.

    Raises `CheckpointError` that names the file.
    """
    places: dict[str, Place] = {}
    if pickles and not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        for name in pickled_files(folder):
            places |= {key: Unpickled.of(folder / name, value) for key, value in _tensors_in(folder / name)}
        if places:
            return places
    for name in weight_files(folder):
        path = folder / name
        if not path.exists():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
            hint = " (pickled .bin weights are not read; convert them to safetensors)" if pickled else ""
            raise CheckpointError(f"{folder}: {name} is missing{hint}; fetch the model again")
        found = places_in(path)
        if twice := sorted(places.keys() & found.keys()):
            raise CheckpointError(
                f"{path}: {twice[0]} is also in {places[twice[0]].path.name}; these files belong to two models, fetch "
                "the model again"
            )
        places |= found
    return places


def _tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    for name, value in unpickled(path).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is not a tensor; it is another kind of file")
        yield name, value


def places_in(path: Path) -> dict[str, Place]:
    """Every tensor of one file. Raises `CheckpointError`."""
    try:
        entries = read_header(path).tensors
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: is damaged or incomplete ({reason}); fetch the file again") from None
    places = {}
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry.dtype}, which is none of {', '.join(DTYPES)}; the weights were "
                "quantised by another program, use the original ones"
            )
        places[name] = Place(path, DTYPES[entry.dtype], entry.shape, entry.start, entry.num_bytes)
    return places


def read(places: Sequence[Place], readers: ThreadPoolExecutor | None = None) -> Tensor:
    """Tensors of one dtype, concatenated; with ``readers`` in several parallel requests, which is faster on disks.

    Raises `CheckpointError` if a file cannot be read.
    """
    first = places[0]
    if isinstance(first, Unpickled):
        parts = [place.read() for place in places]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    content = _memory(sum(place.num_bytes for place in places))
    view = memoryview(content.numpy())  # type: ignore[arg-type]
    runs = []
    for place in places:
        for start in range(0, place.num_bytes, RUN_BYTES):
            size = min(RUN_BYTES, place.num_bytes - start)
            runs.append((place.path, place.start + start, view[:size]))
            view = view[size:]
    each = map if readers is None else readers.map
    deque(each(lambda run: _read_run(*run), runs), maxlen=0)
    num_rows = sum(place.shape[0] for place in places) if len(places) > 1 else 0
    return content.view(first.dtype).view((num_rows, *first.shape[1:]) if num_rows else first.shape)


def _memory(num_bytes: int) -> Tensor:
    """``uint8[num_bytes]``, in large pages if the system has them: allocating small ones costs as much as reading."""
    content = torch.empty(num_bytes, dtype=torch.uint8)
    if num_bytes >= 2 * HUGE_PAGE and sys.platform == "linux":
        start = -(-content.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (content.data_ptr() + num_bytes - start) // HUGE_PAGE * HUGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return content


def _read_run(path: Path, start: int, into: memoryview) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while len(into):
                if not (count := file.readinto(into)):
                    raise OSError("it ends too early")
                into = into[count:]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from None


def read_ahead(groups: Sequence[Sequence[Place]]) -> Iterator[Tensor]:
    """The tensor of each group in turn; the next one is read in the background."""
    if not groups:
        return
    with (
        ThreadPoolExecutor(NUM_READERS, thread_name_prefix="blip2 weights") as readers,
        ThreadPoolExecutor(1, thread_name_prefix="blip2 next weights") as pool,
    ):
        waiting: Future[Tensor] = pool.submit(read, groups[0], readers)
        try:
            for following in [*groups[1:], None]:
                tensor = waiting.result()
                if following is not None:
                    waiting = pool.submit(read, following, readers)
                yield tensor
                del tensor
        finally:
            waiting.cancel()


def release_memory() -> None:
    """Make the C library return freed memory to the system; by default it keeps some per cent of a model."""
    with suppress(AttributeError):  # other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def forget_cached(path: Path) -> None:
    """Drop the file from the system's cache, so that the next read is from the disk (for measurements)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
