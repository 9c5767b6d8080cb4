"""The pictures that the arguments name: files, addresses, ``-`` for standard input, folders of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click

from blip2.errors import ImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"})


class Pictures(NamedTuple):
    """``sources`` in order; ``are_several``: their names stand beside the results (not for a lone file)."""

    sources: list[str]
    are_several: bool
    problems: list[str]
    """What is wrong with a folder, a line each; the pictures of the others are there."""


def find_pictures(arguments: Iterable[str], recursive: bool) -> Pictures:
    """Folders give the pictures in them, by name; all else is taken as it is."""
    arguments = list(arguments)
    if arguments.count("-") > 1:
        raise click.UsageError("standard input holds one picture; give '-' only once")
    sources: list[str] = []
    problems: list[str] = []
    for argument in arguments:
        if not os.path.isdir(argument):
            sources.append(argument)
            continue
        try:
            sources += _in_folder(Path(argument), recursive)
        except ImageError as error:
            problems.append(str(error))
    return Pictures(sources, sources != arguments[:1], problems)


def _in_folder(folder: Path, recursive: bool) -> list[str]:
    try:
        found = sorted(str(path) for path in _files(folder, recursive) if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ImageError(f"{folder}: cannot be read ({error.strerror}); check its rights") from None
    if not found:
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        hint = "" if recursive else "; -r also looks into the folders within"
        raise ImageError(f"{folder}: there are no pictures in this folder ({kinds}){hint}")
    return found


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    # Hidden ones are thumbnails and the like. Links to folders are not followed: they may lead in circles.
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif recursive and path.is_dir() and not path.is_symlink():
            yield from _files(path, recursive)
