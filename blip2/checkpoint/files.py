"""The files of a folder that contain the weights: one, or several with an index."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from blip2.checkpoint.settings import read_json
from blip2.errors import CheckpointError

LENGTH_BYTES = 8
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder of the tokenizer for an InstructBLIP's Q-Former."""
TRAINED = "qformer"
"""Prefix of the files of trained weights, if frozen parts have files of their own (`checkpoint.frozen`). Not "model",
which other programs take for the whole model."""
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED}.index.json"


def is_whole(path: Path) -> bool:
    """Whether a file of weights has the length that its header states; the content is not read."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size = file.seek(0, os.SEEK_END)
            if LENGTH_BYTES + header_bytes > size:
                return False
            file.seek(LENGTH_BYTES)
            entries = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return size == LENGTH_BYTES + header_bytes + max(ends, default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def weight_files(folder: Path) -> list[str]:
    """The names of the files with the weights, whether or not they exist.

    Raises `CheckpointError` for an invalid index, or one that points outside of the folder, and for a folder where
    another program has written a model beside one with separate parts: it is not clear which is meant.
    """
    named = _named_by(folder / INDEX, ".safetensors")
    if any(file.startswith(TRAINED) for file in named) and (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder}: has two models, one in {WEIGHTS} and one in the files that {INDEX} names; remove one of them"
        )
    return named or [WEIGHTS]


def pickled_files(folder: Path) -> list[str]:
    """The .bin weight files of a folder, if there are any. Raises as `weight_files`."""
    named = _named_by(folder / PICKLED_INDEX, ".bin")
    return named or ([PICKLED] if (folder / PICKLED).exists() else [])


def _named_by(index: Path, ending: str) -> list[str]:
    """The files that an index names; none if there is no index."""
    if not index.exists():
        return []
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of names to files; fetch the file again")
    for file in set(places.values()):
        if file != PurePosixPath(file).name or file != PureWindowsPath(file).name or not file.endswith(ending):
            raise CheckpointError(f"{index}: {file!r} is not a {ending} file of this folder; fetch the file again")
    return sorted(set(places.values()))


def digest_of_folder(folder: Path) -> str:
    """Hash of a model's configuration and of the names and sizes of its weights. Raises OSError."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()
