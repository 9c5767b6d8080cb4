"""The only place where a pickle is opened: a file named by the user, and only for the tensors in it."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from blip2.errors import CheckpointError


def unpickled(path: Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, with memory-mapped tensors.

    Raises `CheckpointError` if the file cannot be read, is damaged, or has anything but tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        # Files of PyTorch before 1.6 are not archives: they have no checksums, and are read into memory.
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        reason = "has objects that would run as code" if "GLOBAL" in str(error) else "is no PyTorch file"
        raise CheckpointError(
            f"{path}: {reason}, and was not opened; download it again, or save only its weights, as tensors"
        ) from None
    except (
        RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).split("\n")[0][:120]
        raise CheckpointError(f"{path}: is damaged or incomplete ({reason}); fetch the file again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{path}: has a {kind}, not weights by name; it is another kind of file")
    return content


def _check(path: Path) -> None:
    """Verify the checksum of each tensor in the archive, which PyTorch does not do."""
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise OSError(f"the checksum of {name} is wrong")
