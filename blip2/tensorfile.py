"""Safetensors files: reading their headers, and writing and verifying files of our own.

Our files have a ``checksum`` in their metadata: a CRC-32 of all other bytes. Files of earlier versions have none and
are read without it. Nothing is memory-mapped: a map of a file that another program truncates would kill the process.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2.disk import PathLike, written

CHECKSUM = "checksum"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The place of a tensor: ``start`` in bytes from the beginning of the file; ``dtype`` by the format's name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """Metadata and tensors by name."""

    about: dict[str, str]
    tensors: dict[str, Entry]


def read_header(path: PathLike) -> Header:
    """Read a header. Raises OSError, whose text is the reason, for a file that is unreadable or incomplete.

    The library validates the file but does not expose the positions of tensors, so the header (JSON after its length,
    https://github.com/huggingface/safetensors) is parsed again here.
    """
    try:
        with safe_open(path, framework="pt"):  # validates the header and the file's length
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(size))
        about = content.pop("__metadata__", None) or {}
        entries = {}
        for name, entry in content.items():
            start, end = entry["data_offsets"]
            entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)
    except OSError:
        raise
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(" ".join(str(error).split())) from None
    return Header(about, entries)


def save(
    path: PathLike, tensors: Mapping[str, Tensor], about: Mapping[str, str], unfinished: Path | None = None
) -> None:
    """Write tensors with a checksum, atomically and durably (`disk.written`). Raises OSError."""
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with written(path, unfinished) as place:
        try:
            place.touch()
            mode = place.stat().st_mode
            save_file(content, place, {**about, CHECKSUM: _checksum(content, about)})
            place.chmod(mode)  # the library gives access to the owner only
        except SafetensorError as error:
            raise OSError(" ".join(str(error).split())) from None


def load(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each in its own memory, and the metadata without the checksum.

    Raises OSError, whose text is the reason, also for a wrong checksum.
    """
    header = read_header(path)
    tensors = {}
    with open(path, "rb", buffering=0) as file:
        for name, entry in header.tensors.items():
            if entry.dtype not in DTYPES:
                raise OSError(f"{name} has dtype {entry.dtype}, which our files do not use")
            content = torch.empty(entry.num_bytes, dtype=torch.uint8)
            view = memoryview(content.numpy())  # type: ignore[arg-type]
            file.seek(entry.start)
            while len(view):
                if not (count := file.readinto(view)):
                    raise OSError("it ends too early")
                view = view[count:]
            tensors[name] = content.view(DTYPES[entry.dtype]).view(entry.shape)
    about = {name: value for name, value in header.about.items() if name != CHECKSUM}
    if CHECKSUM in header.about and header.about[CHECKSUM] != _checksum(tensors, about):
        raise OSError("its checksum is wrong")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    names = sorted(tensors)
    kinds = [[name, NAMES[tensors[name].dtype], list(tensors[name].shape)] for name in names]
    crc32 = zlib.crc32(json.dumps([sorted(about.items()), kinds]).encode("ascii"))
    for name in names:
        crc32 = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data, crc32)
    return f"{crc32:08x}"
