"""Repositories with other settings than usual: another cache folder, a token, or a subfolder.

Uses only the hub's own client; the resumable downloads of `hub` are for the usual cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from blip2.checkpoint.hub import NEWEST, SMALL_FILES, _explained, is_offline
from blip2.errors import CheckpointError
from blip2.published import PUBLISHED

WEIGHTS = ("*.safetensors",)


@dataclass(frozen=True)
class Place:
    """``cache_dir``: instead of the usual one. ``token``: for gated repositories, False for none. ``subfolder``: of the
    repository. ``force``: download again."""

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    subfolder: str = ""
    force: bool = False

    @property
    def is_usual(self) -> bool:
        """Whether `names.resolve` gives the same; the saved token is always used."""
        return self in (Place(), Place(token=True))


def fetch(name: str, place: Place, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a model in a repository; `CheckpointError` as for `hub.pull`."""
    if revision is None and name in PUBLISHED:
        revision = PUBLISHED[name].revision
    inside = f"{place.subfolder.strip('/')}/" if place.subfolder else ""
    with _explained(name, revision or NEWEST):
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=place.cache_dir,
            token=place.token,
            force_download=place.force,
            local_files_only=local_files_only or is_offline(),
            allow_patterns=[f"{inside}{pattern}" for pattern in (*SMALL_FILES, *WEIGHTS)],
        )
    return inside_of(Path(folder), place.subfolder)


def inside_of(folder: Path, subfolder: str) -> Path:
    """A subfolder of a model's folder; CheckpointError if it does not exist or is outside."""
    inside = folder / subfolder
    if not inside.resolve().is_relative_to(folder.resolve()) or not inside.is_dir():
        raise CheckpointError(f"{folder}: has no folder {subfolder}; leave subfolder out, or name one that exists")
    return inside
