"""The pictures in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from blip2.disk import Stamp, stamp_of
from blip2.errors import ImageError, IndexFileError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"})


def pictures_in(folder: Path, recursive: bool) -> list[str]:
    """The picture files in a folder, by name. Raises ImageError if there are none, or a folder cannot be read."""
    try:
        found = sorted(
            str(path) for path in _files(folder, recursive) if os.path.splitext(path.name)[1].lower() in SUFFIXES
        )
    except OSError as error:
        raise ImageError(f"{folder}: cannot be read ({error.strerror}); check its rights") from None
    if not found:
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        hint = "" if recursive else "; -r also looks into the folders within"
        raise ImageError(f"{folder}: there are no pictures in this folder ({kinds}){hint}")
    return found


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    # Hidden ones are thumbnails and the like. Links to folders are not followed: they may lead in circles.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield folder / entry.name
            elif recursive and entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, recursive)


class Collection:
    """All picture files that folders and single files give, by absolute path, each with its stamp.

    Raises IndexFileError for what does not exist, and for a folder without pictures: it may be a drive that is not
    there today, and everything would be forgotten.
    """

    def __init__(self, places: Iterable[str | os.PathLike[str]]) -> None:
        self.stamps: dict[str, Stamp] = {}
        self._files: set[str] = set()
        self._folders: list[str] = []
        for place in (os.path.abspath(place) for place in places):
            if os.path.isdir(place):
                self._folders.append(os.path.join(place, ""))
                found = self._in_folder(place)
            else:
                self._files.add(place)
                found = [place]
            for path in found:
                if (stamp := stamp_of(path)) is not None:
                    self.stamps[path] = stamp
                elif path == place:
                    raise IndexFileError(f"{place}: no such file or folder; check the path")
        if not self.stamps:
            raise IndexFileError("there is no folder to look for pictures in; name at least one")

    def covers(self, path: str) -> bool:
        """Whether a picture of this path would be among them if it existed."""
        return path in self._files or path.startswith(tuple(self._folders))

    @staticmethod
    def _in_folder(folder: str) -> list[str]:
        try:
            return pictures_in(Path(folder), recursive=True)
        except ImageError as error:
            raise IndexFileError(f"{error}; the index is left as it was") from None
