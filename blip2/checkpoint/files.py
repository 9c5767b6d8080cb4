"""Which files of a folder hold the weights: one, or several with an index."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from blip2.checkpoint.settings import read_json
from blip2.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights, whether or not they are there.

    Raises `CheckpointError` for an index that is none, or that points out of the folder.
    """
    index = folder / INDEX
    if not index.exists():
        return [WEIGHTS]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of names to files; fetch the file again")
    for file in set(places.values()):
        if file != PurePosixPath(file).name or file != PureWindowsPath(file).name or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r} is not a .safetensors file of this folder; fetch the file again")
    return sorted(set(places.values()))
