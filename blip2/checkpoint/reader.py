"""Tensors from safetensors files, each read straight into memory of its own.

Not through the library's memory map: its pages would count as this process's memory, as many of them as the file
has, and reading them fault by fault is slower. The library checks the files; what it knows of places is not to be
had from it, so the header (JSON behind its length, https://github.com/huggingface/safetensors) is read once more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip2.checkpoint.files import weight_files
from blip2.errors import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``start`` and ``num_bytes`` in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """The tensor. Raises `CheckpointError` if the file was cut since it was opened, or cannot be read."""
        content = torch.empty(self.num_bytes, dtype=torch.uint8)
        view = memoryview(content.numpy())  # type: ignore[arg-type]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                done = 0
                while done < self.num_bytes:
                    if not (count := file.readinto(view[done:])):
                        raise OSError("it ends too early")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}); fetch the file again") from None
        return content.view(self.dtype).view(self.shape)


def find_tensors(folder: Path) -> dict[str, Place]:
    """Every tensor of the model in a folder. Raises `CheckpointError` that names the file."""
    places: dict[str, Place] = {}
    for name in weight_files(folder):
        path = folder / name
        if not path.exists():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
            hint = " (pickled .bin weights are not read; convert them to safetensors)" if pickled else ""
            raise CheckpointError(f"{folder}: {name} is missing{hint}; fetch the model again")
        places |= _places(path)
    return places


def _places(path: Path) -> dict[str, Place]:
    try:
        with safe_open(path, framework="pt"):  # whether header and length of the file are sound
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged or cut short ({error}); fetch the file again") from None
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of type {entry['dtype']}, which is none of {', '.join(DTYPES)}; "
                "the weights were quantised by another program, use the original ones"
            )
        start, end = entry["data_offsets"]
        places[name] = Place(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + start, end - start)
    return places


def read_ahead(groups: Sequence[Sequence[Place]]) -> Iterator[list[Tensor]]:
    """The tensors of each group in turn; while one is worked on, the next is read."""
    if not groups:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="blip2 weights") as pool:
        waiting: Future[list[Tensor]] = pool.submit(_read, groups[0])
        try:
            for following in [*groups[1:], None]:
                tensors = waiting.result()
                if following is not None:
                    waiting = pool.submit(_read, following)
                yield tensors
                del tensors
        finally:
            waiting.cancel()


def _read(group: Sequence[Place]) -> list[Tensor]:
    return [place.read() for place in group]


def forget_cached(path: Path) -> None:
    """Let the system drop the file from its cache, so that the next reading is from the disk (for measurements)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
