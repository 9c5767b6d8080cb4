"""The images that the arguments name: files, URLs, ``-`` for standard input, folders of files, an index.

Plain output escapes control characters and backslashes in names, so that each line is one image. With ``-0``, names are
not escaped and end with NUL instead of a newline.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from blip2.errors import ImageError, OptionError
from blip2.plaintext import ENCODINGS

if TYPE_CHECKING:
    from blip2.api import Pipeline
    from blip2.encoded import EncodedImage
    from blip2.index import Index

READING = (
    click.option("--max-pixels", type=int, metavar="N", help="Largest image to read.  [default: 250 million]"),
    click.option("--allow-truncated", is_flag=True, help="Read truncated files as far as possible."),
)
FOLDERS = (
    click.option("-r", "--recursive/--no-recursive", default=True, help="Whether to search subfolders for images.  "
                 "[default: yes]"),
    click.option("--exclude", multiple=True, metavar="PATTERN", help='Skip files and folders with this name or path, '
                 'such as "lost+found" or "*.gif". Repeatable.'),
    click.option("--files-from", metavar="FILE", help="Read more names of images and folders from FILE, one per line; "
                 "- is standard input."),
)  # fmt: skip
NULL = (
    click.option("-0", "--null", "is_null", is_flag=True, help="Separate names by NUL bytes instead of newlines, in "
                 "the output and in --files-from; names are not escaped."),
)  # fmt: skip
IMAGE_OPTIONS = (*FOLDERS, *NULL, *READING)


def of_reading(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `READING` that were given out of all options of a subcommand, for `load`."""
    given = {name: options.pop(name) for name in ("max_pixels", "allow_truncated")}
    return {name: value for name, value in given.items() if value is not None and value is not False}


@dataclass(frozen=True)
class Asked:
    """The requested images: arguments and the names of a list, and how folders are searched."""

    arguments: list[str]
    recursive: bool
    exclude: tuple[str, ...]
    is_null: bool
    is_listed: bool
    """Whether some names come from a list, whose length is not known."""

    @classmethod
    def of(cls, arguments: Iterable[str], options: dict[str, Any], metavar: str = "IMAGES...") -> Asked:
        """Take the options of `FOLDERS` and `NULL` out of all options of a subcommand. UsageError without an image."""
        recursive, exclude = options.pop("recursive"), options.pop("exclude")
        files_from, is_null = options.pop("files_from"), options.pop("is_null")
        found = list(arguments)
        if files_from is not None:
            if files_from == "-" and "-" in found:
                raise click.UsageError("standard input cannot be both a list of names and an image; leave out one '-'")
            found += names_in(files_from, is_null)
        elif not found:
            raise click.UsageError(f"Missing argument '{metavar}'.")
        if found.count("-") > 1:
            raise click.UsageError("standard input holds one image; give '-' only once")
        return cls(found, recursive, exclude, is_null, files_from is not None)


def names_in(file: str, is_null: bool) -> list[str]:
    """The names in a file, one per line (or each before a NUL byte). OptionError if it cannot be read."""
    try:
        if file == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as stream:
                content = stream.read()
    except OSError as error:
        raise OptionError(f"--files-from {file}: cannot be read ({error.strerror}); give a list of images") from None
    encoding = next((name for mark, name in ENCODINGS if content.startswith(mark)), None)
    if encoding is not None:  # a byte order mark, as on Windows; without one, names may be any bytes
        how = "surrogateescape" if encoding == "utf-8-sig" else "replace"
        content = content.decode(encoding, how).encode("utf-8", "surrogateescape")
    lines = content.split(b"\0") if is_null else content.splitlines()
    if not is_null and b"\0" in content:
        raise OptionError(f"--files-from {file}: contains NUL bytes; add -0 if they separate the names")
    found = [os.fsdecode(line) for line in lines if line.strip()]
    if not found:
        raise OptionError(f"--files-from {file}: names no image; write one name per line")
    return found


NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029" + ("" if os.sep == "\\" else r"\\") + "]")


def shown(name: str, is_null: bool = False) -> str:
    """A name for plain output: on one line and without a tab."""
    if is_null:
        return name
    return NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), click.format_filename(name))


def echo(columns: Sequence[str], is_null: bool) -> None:
    """Print a line of plain output."""
    end = "\0" if is_null else "\n"
    click.echo(("\t".join(columns) + end).encode("utf-8", "surrogateescape"), nl=False)


@dataclass(frozen=True)
class FoundImages:
    """``sources`` in order. ``are_several``: their names are shown beside the results (not for a single file).

    With an ``index``, sources are only names: the features are in the index, in the same order.
    """

    sources: list[str]
    are_several: bool
    problems: list[str] = field(default_factory=list)
    """What is wrong with a folder or its content, one line each; the other images are still processed."""
    notes: list[str] = field(default_factory=list)
    """Files that were skipped because they are not images."""
    index: Index | None = None

    def model(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `MODEL`; if no model is named, the one that made the index."""
        if self.index is None or options["model"] is not None:
            return options
        return options | {"model": self.index.model_name}

    def seen_by(self, blip: Pipeline, batch_size: int) -> Iterator[EncodedImage | ImageError]:
        """What the model encoded of each image, or the error. IndexFileError if another model made the index."""
        if self.index is not None:
            self.index.check_model(blip)
        images: Sequence[Any] = self.sources if self.index is None else self.index
        return blip.each_encoded(images, on_error="return", batch_size=batch_size)


def changes(index: Index, rows: Iterable[int] | None = None) -> list[str]:
    """One line for each image (of these rows, or all) whose file has changed since it was encoded."""
    return [
        f"{shown(path)}: has changed since it was encoded; update the index with blip2 index"
        for path in index.changed(rows)
    ]


def find_images(asked: Asked, *, takes_index: bool = False) -> FoundImages:
    """The images of folders, sorted by name, and those of an index; everything else is taken as it is."""
    from blip2.data.folders import find_in
    from blip2.index import Index, is_index  # imports torch

    arguments = asked.arguments
    indexes = [argument for argument in arguments if os.path.isfile(argument) and is_index(argument)]
    if indexes:
        if not takes_index or len(arguments) > 1:
            how = "give it alone" if takes_index else "give images, or use blip2 search"
            raise click.UsageError(f"{click.format_filename(indexes[0])} is an index of images; {how}")
        index = Index.open(indexes[0])
        index.check_kind("ask")
        return FoundImages(index.paths, True, changes(index), index=index)
    found = find_in(arguments, recursive=asked.recursive, exclude=asked.exclude)
    problems, notes = list(found.problems), list[str]()
    if skipped_files := found.skipped_files():
        (problems if found.missing else notes).append(skipped_files)
    are_several = asked.is_listed or found.images != arguments[:1]
    return FoundImages(found.images, are_several, problems, notes)
