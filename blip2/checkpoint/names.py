"""Where a model is: the bundled miniature, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from blip2.errors import CheckpointError

MINIATURE = Path(__file__).parents[1] / "miniature"
BUNDLED = {"miniature": MINIATURE / "generative", "miniature-matching": MINIATURE / "matching"}
PATTERNS = ("*.json", "*.safetensors", "*.txt", "tokenizer*", "spiece.model")  # never the pickled twins


def resolve(name: str | Path | None = None) -> Path:
    """The folder of a model; None is the bundled miniature, ``miniature-matching`` its matching half.

    A name that is no folder is taken for a hub repository: from the local cache if it is there, else downloaded.
    """
    if name is None:
        name = "miniature"
    if str(name) in BUNDLED:
        return BUNDLED[str(name)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name}: no such folder; give the folder of a model, a hub name such as Salesforce/blip2-opt-2.7b, "
            f"or one of {', '.join(BUNDLED)}"
        )
    return _from_hub(str(name))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder

    for is_offline in (True, False):
        try:
            return Path(snapshot_download(name, allow_patterns=list(PATTERNS), local_files_only=is_offline))
        except Exception as error:  # whatever the hub's client raises, the remedy is the same
            reason = str(error).split("\n")[0]
    raise CheckpointError(f"{name}: is neither a folder nor in the cache, and the hub did not give it ({reason})")
