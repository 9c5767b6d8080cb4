"""The only place where a pickle is opened: a file that a person names, and for nothing but the tensors in it."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from blip2.errors import CheckpointError


def unpickled(path: Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, its tensors mapped into memory where they lie.

    Raises `CheckpointError` if the file cannot be read, is not what was written, or holds anything but tensors and
    plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        # Files of the format before PyTorch 1.6 are no archives: they have no checksums, and are read into memory.
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        reason = "holds objects that would run as code" if "GLOBAL" in str(error) else "is damaged or no PyTorch file"
        raise CheckpointError(
            f"{path}: {reason}, and is not opened; fetch it again, or save its weights alone, as tensors"
        ) from None
    except (
        RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).split("\n")[0][:120]
        raise CheckpointError(f"{path}: is damaged or cut short ({reason}); fetch the file again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{path}: holds a {kind}, not weights by name; it is another kind of file")
    return content


def _check(path: Path) -> None:
    """An archive has a checksum of each tensor, at which PyTorch does not look."""
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise OSError(f"{name} is not what was written")
