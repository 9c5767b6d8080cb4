"""The pictures that the arguments name: files, addresses, ``-`` for standard input, folders of files, an index."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.errors import ImageError

if TYPE_CHECKING:
    from blip2.api import Pipeline
    from blip2.encoded import EncodedImage
    from blip2.index import Index


@dataclass(frozen=True)
class Pictures:
    """``sources`` in order; ``are_several``: their names stand beside the results (not for a lone file).

    With an ``index`` they are only named: what was seen of them is in there, in the same order.
    """

    sources: list[str]
    are_several: bool
    problems: list[str]
    """What is wrong with a folder, a line each; the pictures of the others are there."""
    index: Index | None = None

    def model(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `MODEL`; if none is named, the model that made the index."""
        if self.index is None or options["model"] is not None:
            return options
        return options | {"model": self.index.model_name}

    def seen_by(self, blip: Pipeline, batch_size: int) -> Iterator[EncodedImage | ImageError]:
        """What the model sees of them, or what is wrong with one. IndexFileError if another one made the index."""
        if self.index is not None:
            self.index.check_model(blip)
        images: Sequence[Any] = self.sources if self.index is None else self.index
        return blip.each_encoded(images, on_error="return", batch_size=batch_size)


def changes(index: Index, rows: Iterable[int] | None = None) -> list[str]:
    """A line for each picture, of these rows or of all, whose file is not what was seen any more."""
    return [
        f"{click.format_filename(path)}: has changed since it was seen; bring the index up to date with blip2 index"
        for path in index.changed(rows)
    ]


def find_pictures(arguments: Iterable[str], recursive: bool, *, takes_index: bool = False) -> Pictures:
    """Folders give the pictures in them, by name, and an index those that it holds; all else is taken as it is."""
    from blip2.index import Index, is_index  # imports torch
    from blip2.index.folders import pictures_in

    arguments = list(arguments)
    if arguments.count("-") > 1:
        raise click.UsageError("standard input holds one picture; give '-' only once")
    indexes = [argument for argument in arguments if is_index(argument)]
    if indexes:
        if not takes_index or len(arguments) > 1:
            how = "give it alone" if takes_index else "give pictures, or use blip2 search"
            raise click.UsageError(f"{click.format_filename(indexes[0])} is an index of pictures; {how}")
        index = Index.open(indexes[0])
        index.check_kind("ask")
        return Pictures(index.paths, True, changes(index), index)
    sources: list[str] = []
    problems: list[str] = []
    for argument in arguments:
        if not os.path.isdir(argument):
            sources.append(argument)
            continue
        try:
            sources += pictures_in(Path(argument), recursive)
        except ImageError as error:
            problems.append(str(error))
    return Pictures(sources, sources != arguments[:1], problems)
