"""Write a model made from another model, with its tokenizer and settings: completely, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.cli.progress import bytes_bar
from blip2.disk import replace
from blip2.errors import CheckpointError

if TYPE_CHECKING:
    from blip2.model import Blip2, Blip2Matcher

    Model = Blip2 | Blip2Matcher

OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
COMPANIONS = (
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "chat_template.jinja", *OF_TOKENIZER,
    *(f"qformer_tokenizer/{name}" for name in OF_TOKENIZER),
)  # fmt: skip
"""Files beside the weights and the tokenizer that do not depend on the precision of the weights."""
UNFINISHED = "unfinished"


def check_is_new(out: Path) -> None:
    """Raise CheckpointError if ``out`` exists."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another name, or delete it")


def write_from(
    folder: Path,
    out: Path,
    load: Callable[[Any], Model],
    *,
    doing: str,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Load a model made from the one in a folder, and write it. ``load`` gets a callback for progress.

    Files go into a subfolder of ``out`` first and are moved from there, config.json last: no partial model is left.
    """
    from blip2 import checkpoint

    was_there = out.exists()
    unfinished = out / UNFINISHED
    try:
        with bytes_bar(doing) as (progress, writes):
            model = load(progress)
            if (found := checkpoint.damage(model)) is not None:
                raise CheckpointError(f"{folder}: has weights that are NaN or infinite: {found}")
            writes()
            checkpoint.save(model, unfinished, tokenizer=folder / "tokenizer.json", quantization=quantization)
        # Copy the original's files, if any: what `save` could write instead would be a guess.
        for name in COMPANIONS:
            (unfinished / name).unlink(missing_ok=True)
            if (folder / name).exists():
                shutil.copyfile(folder / name, unfinished / name)
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
        for path in files:
            (out / path).parent.mkdir(exist_ok=True)
        whole = sorted(files, key=lambda path: path == Path("config.json"))
        replace([(unfinished / path, out / path) for path in whole])
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror}); free some space, or name another folder"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not was_there:
            with suppress(OSError):  # it already holds a model, or was never created
                out.rmdir()
