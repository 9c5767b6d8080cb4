"""Finds the files of a benchmark under a folder, or says where to get them; unpacks images from parquet files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.collection.sources.fields import image_of
from blip2.collection.sources.parquet import Parquet
from blip2.data.kinds import KINDS
from blip2.data.stream import MEMBER, Element, elements
from blip2.errors import CollectionError, option
from blip2.evaluate.benchmark import Benchmark, Layout
from blip2.plaintext import NotTextError, read_pieces

PARQUET = ".parquet"
ENDINGS = (".json", ".jsonl", PARQUET)
UNPACKED = "unpacked"
"""Folder for images from parquet files, inside the data folder, shared by all models."""
SIGNATURES = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}


def find(benchmark: Benchmark, data: Path) -> tuple[Layout, list[Path]]:
    """The first layout whose files all exist. Raises CollectionError if files are missing, with their origin and size,
    or if several copies match."""
    if not data.is_dir():
        raise CollectionError(f"{data}: there is no such folder; name the data folder with {option('data')}")
    there = [
        Path(folder, name)
        for folder, folders, names in os.walk(data.absolute(), followlinks=True)
        if not folders.sort()
        for name in sorted(names)
        if name.endswith(ENDINGS)
    ]
    for layout in benchmark.layouts:
        found = [[path for path in there if fnmatchcase(path.as_posix().lower(), name)] for name in layout.files]
        if all(found):
            return _of_content(layout, found[0][0]), [path for some in found for path in _of_one_folder(some, data)]
    wanted = "; ".join(map(str, benchmark.origins))
    raise CollectionError(
        f"{data}: does not have the files of this benchmark. It needs {wanted}. Nothing is downloaded automatically: "
        f"put them into one folder, and name it with {option('data')}"
    )


def _of_one_folder(paths: Sequence[Path], data: Path) -> Sequence[Path]:
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    if len(folders) > 1 or (len(paths) > 1 and paths[0].suffix != PARQUET):
        one, other = list(folders)[:2] if len(folders) > 1 else paths[:2]
        raise CollectionError(f"{data}: {one} and {other} both match; name the folder of one of them with "
            f"{option('data')}")
    return paths


def _of_content(layout: Layout, path: Path) -> Layout:
    """The authors' library uses the same file names for lists as others do for objects."""
    try:
        if layout.kind.items == MEMBER and next(read_pieces(path), "").lstrip().startswith("["):
            return replace(layout, kind=KINDS["list"])
    except (OSError, NotTextError) as error:
        raise CollectionError(f"{path}: cannot be read ({error}); download it again") from None
    return layout


def has_column(path: Path, name: str) -> bool:
    """Whether a file has a column; True for files other than parquet."""
    return path.suffix != PARQUET or name in Parquet(str(path)).columns


class Opened:
    """Elements of any of the files, as from `data.stream.elements`. Images inside files are unpacked into ``folder``,
    with names from their content, and rows get their path. Raises CollectionError, RecipeError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._there: set[str] = set()

    def __call__(self, path: Path) -> Iterator[Element]:
        if path.suffix == PARQUET:
            return self._rows(path)
        return elements(path)

    @staticmethod
    def holds(files: Sequence[Path]) -> bool:
        """Whether the files contain the images."""
        return any(path.suffix == PARQUET and Parquet(str(path)).holding_bytes for path in files)

    def _rows(self, path: Path) -> Iterator[Element]:
        table = Parquet(str(path))
        holding = {*table.holding_bytes}
        for number, row in enumerate(table.rows()):
            values = {name: self._unpacked(value, row.name) if name in holding else value
                      for name, value in row.values.items()}  # fmt: skip
            yield Element(_section(values), number, values, row.name)

    def _unpacked(self, value: object, place: str) -> str:
        content, problem = image_of(value, "image")
        if not isinstance(content, bytes):
            raise CollectionError(f"{place}: {problem or 'has a path instead of an image'}; download the file again")
        ending = next((ending for begin, ending in SIGNATURES.items() if content.startswith(begin)), ".img")
        path = self._folder / f"{blake2b(content, digest_size=12).hexdigest()}{ending}"
        if path.name not in self._there:
            stamp = disk.stamp_of(path)
            if stamp is None or stamp.size != len(content):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    disk.write_bytes(path, content)
                except OSError as error:
                    raise CollectionError(
                        f"{path}: cannot be written ({error.strerror}); images of parquet files are unpacked there, "
                        f"so {option('data')} has to be a writable folder"
                    ) from None
            self._there.add(path.name)
        return str(path)


def _section(values: Mapping[str, Any]) -> str:
    """Images in files of their own are found by their id."""
    return "images" if {"id", "image"} == values.keys() else ""
