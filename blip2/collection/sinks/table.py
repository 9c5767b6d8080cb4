"""One file for all images: its check, and its writing once all results are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from blip2.collection.columns import plain
from blip2.collection.record import Result, Source
from blip2.collection.sinks.places import Plain, check_file, is_text, paths_of, relative, replacing
from blip2.errors import CollectionError
from blip2.image import name_of


@dataclass(frozen=True)
class Format:
    """``write`` gets the open file (UTF-8), all results, and the file's folder; it returns notes for the user.

    ``paths``: how images are named in it: by their path "below" the file's folder, by the path of "any" file, as
    "named" in the source if they have no file, or not at all (""). ``probe``: checks what is known of the first image
    before the model is loaded, and may raise CollectionError.
    """

    write: Callable[[IO[str], Iterable[Result], Path], Iterable[str]]
    paths: str = "any"
    wants: frozenset[str] = frozenset()
    encoding: str = "utf-8"
    probe: Callable[[Result], object] | None = None


class Table(Plain):
    """``may_replace``: whether an existing file is an output of the same command, or may be replaced."""

    def __init__(self, path: Path, format: Format, *, may_replace: bool = False) -> None:
        super().__init__()
        self.wants = format.wants
        self._path = path
        self._format = format
        self._may_replace = may_replace

    def check(self, source: Source) -> None:
        check_file(self._path, may_replace=self._may_replace)
        images = paths_of(source) or ()
        if self._format.paths in ("below", "any") and paths_of(source) is None:
            raise CollectionError(
                f"{self._path}: this format names image files, and these images have none; give --format "
                "jsonl or parquet, or a folder for shards"
            )
        if self._format.probe is not None and source.units:
            for record in islice(source.records(source.units[0]), 1):
                self._format.probe(Result(record.key, "", "", record.name, columns=plain(record.columns)))
        if self._format.paths == "below":
            check_folder_table(self._path, images)
        elif self._format.paths:
            for image in images:
                check_image(image, self._path)

    def whole(self, results: Iterable[Result]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(self._path) as unfinished,
            open(unfinished, "w", encoding=self._format.encoding, newline="") as file,
        ):
            self.notes[:] = self._format.write(file, results, self._path.parent)


def check_folder_table(path: Path, images: Iterable[str]) -> None:
    """Check that `datasets` will read a table of an ImageFolder. Raises CollectionError."""
    for suffix in (".csv", ".jsonl", ".parquet"):
        other = path.with_name(f"metadata{suffix}")
        if path.stem == "metadata" and other != path and other.exists():
            raise CollectionError(
                f"{other}: datasets cannot read a folder with both this and {path.name}; remove it, or use its name"
            )
    for image in images:
        check_image(image, path, is_below=True)


def check_image(image: str, table: Path, *, is_below: bool = False) -> None:
    """Check that a table with this path can name the image. Raises CollectionError."""
    if not is_text(image):
        raise CollectionError(
            f"{name_of(image)}: the name is not UTF-8, which {table.name} cannot hold; rename it, or give "
            "--format jsonl"
        )
    if is_below and not relative(image, table.parent):
        raise CollectionError(
            f"{image}: is not in the folder of {table}, as datasets needs it; write the table into the folder "
            "of the images, or give --format jsonl"
        )
