"""Resolves model names: the bundled miniature, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from blip2.errors import CheckpointError
from blip2.published import PUBLISHED

MINIATURE = Path(__file__).parents[1] / "miniature"
BUNDLED = {"miniature": MINIATURE / "generative", "miniature-itm": MINIATURE / "matching"}
MADE = {"photographs": "generative", "photographs-itm": "matching"}
"""Models that the user makes (``make photographs`` in the repository), and their folders in `made_folder`."""


def made_folder() -> Path:
    """Folder of the models in `MADE`, in the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(data) / "blip2" / "photographs"


def resolve(name: str | Path | None = None, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a model; None is the bundled miniature, ``miniature-itm`` its matching model; also those of `MADE`.

    A name that is not a folder is a hub repository: taken from the local cache if complete, else downloaded
    (`hub.pull`), unless ``local_files_only`` or HF_HUB_OFFLINE=1 forbid it. ``revision``: a branch, a tag or a commit;
    by default the commit in `PUBLISHED` for a published model, and the newest for any other. If that is not in the
    cache and the hub cannot be reached, another cached commit is used, with a warning.

    Raises `CheckpointError` that says what was searched and what to do.
    """
    if name is None:
        name = "miniature"
    if not isinstance(name, str | os.PathLike):
        raise CheckpointError(f"{name!r} is not a model name; give a folder, or a name such as {next(iter(PUBLISHED))}")
    path = Path(name).expanduser()
    if revision is not None and (str(name) in BUNDLED or path.is_dir()):
        raise CheckpointError(f"{name}: is a local model without revisions; leave {revision} out")
    if str(name) in BUNDLED:
        return BUNDLED[str(name)]
    if path.is_dir():
        return path
    if str(name) in MADE:
        if (folder := made_folder() / MADE[str(name)]).is_dir():
            return folder
        raise CheckpointError(f"{name}: does not exist yet ({folder}); run make photographs in the repository")
    if path.suffix == ".pth":
        raise CheckpointError(f"{name}: is a checkpoint of the authors' code; convert it with blip2 convert")
    if path.is_file():
        raise CheckpointError(f"{name}: is a file; give the folder that contains config.json and the weights")
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name}: no such folder; {nearest(name)}give the folder of a model, a hub name such as "
            f"{next(iter(PUBLISHED))}, or one of {', '.join(BUNDLED)}"
        )
    from blip2.checkpoint import hub  # slow to import, and not needed for a folder

    if local_files_only or hub.is_offline():
        return hub.cached(str(name), revision)
    return hub.found(str(name), revision)


def nearest(name: str | Path) -> str:
    """A similar existing name, as the beginning of a remedy; or ""."""
    near = difflib.get_close_matches(str(name), [*BUNDLED, *PUBLISHED], n=1, cutoff=0.8)
    return f"did you mean {near[0]}? Or " if near and near[0] != name else ""


def pull(name: str, *, revision: str | None = None) -> Path:
    """Download what the cache lacks of a hub repository, and return its folder; asks the hub for the newest commit.

    Progress (rate and remaining time) is shown on stderr. Raises `CheckpointError`, see `hub.pull`.
    """
    from blip2.checkpoint import hub

    return hub.pull(name, revision)
