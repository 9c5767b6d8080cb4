"""Finds the images in folders and their subfolders.

A bad entry does not stop the search. Files that should be images but cannot be read are reported by name; other files
are counted, so that nothing is skipped silently.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from blip2.image import suffixes
from blip2.image.sources import name_of

MOST_KINDS = 6
"""Number of file types that are listed by suffix; the rest is only counted."""


@dataclass
class Found:
    """The content of folders. Hidden and excluded entries are not counted."""

    images: list[str] = field(default_factory=list)
    """Paths, sorted by name within each folder."""
    problems: list[str] = field(default_factory=list)
    """One line for each entry that could not be examined."""
    unknown: list[str] = field(default_factory=list)
    """Folders that could not be read or are empty, such as the mount point of a missing drive."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files, by suffix."""
    links: int = 0
    """Links to folders, which are not followed because they may form cycles."""
    missing: Counter[str] = field(default_factory=Counter)
    """Images whose format needs another package, by what to install."""

    @property
    def is_complete(self) -> bool:
        """Whether `images` has all images in the folders."""
        return not (self.problems or self.missing)

    def skipped_files(self, apart: Collection[str] = ()) -> str:
        """One line about skipped entries, or "". ``apart``: suffixes not to mention."""
        parts = [f"{_number(count, 'image')} ({needed} reads them)" for needed, count in self.missing.items()]
        others = Counter({suffix: count for suffix, count in self.others.items() if suffix not in apart})
        if others:
            kinds = [f"{count:,} {suffix}" for suffix, count in others.most_common(MOST_KINDS)]
            kinds += ["..."] if len(others) > MOST_KINDS else []
            parts.append(f"{_number(others.total(), 'other file')} ({', '.join(kinds)})")
        if self.links:
            parts.append(_number(self.links, "linked folder"))
        return f"skipped in folders: {', '.join(parts)}" if parts else ""


def find_in(places: Iterable[str], *, recursive: bool = True, exclude: Iterable[str] = ()) -> Found:
    """Find images in folders by the suffixes that can be read; a path that is not a folder is returned as it is.

    ``exclude``: shell patterns ("lost+found", "*.gif") for a name or a path relative to its folder. No file is opened,
    so that a pipe cannot block. Raises nothing: a folder that is unreadable or has no images is a problem.
    """
    found, patterns = Found(), list(exclude)
    for place in places:
        if os.path.isdir(place):
            _Walk(place, recursive, patterns, found, *suffixes()).run()
        else:
            found.images.append(place)
    return found


@dataclass
class _Walk:
    top: str
    recursive: bool
    exclude: list[str]
    found: Found
    readable: frozenset[str]
    missing: dict[str, str]
    num_left: int = 0
    """Number of subfolders that were not searched."""

    def run(self) -> None:
        images: list[str] = []
        num_reported = self._num_reported()
        waiting = [self.top]
        while waiting:
            place = waiting.pop()
            try:
                with os.scandir(place) as listed:
                    entries = list(listed)
            except OSError as error:
                self.found.unknown.append(place)
                self._problem(place, f"this folder cannot be read ({error.strerror}); check its permissions")
                continue
            for entry in entries:
                if entry.name.startswith(".") or self._is_excluded(entry):  # hidden, such as thumbnails
                    continue
                if _is_folder(entry):
                    if self.recursive:
                        waiting.append(entry.path)
                    else:
                        self.num_left += 1
                elif self._is_image(entry):
                    images.append(entry.path)
        self.found.images += sorted(images)
        if not images and self._num_reported() == num_reported:
            hint = "; its subfolders were not searched" if self.num_left else ""
            self.found.unknown.append(self.top)
            self._problem(self.top, f"there are no images in this folder{hint}")

    def _num_reported(self) -> int:
        """Number of unreadable images and folders."""
        return len(self.found.problems) + self.found.missing.total()

    def _is_excluded(self, entry: os.DirEntry[str]) -> bool:
        within = os.path.relpath(entry.path, self.top) if self.exclude else ""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (entry.name, within))

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry that is not a folder is a readable image; otherwise it is counted."""
        suffix = os.path.splitext(entry.name)[1].lower()
        try:
            if entry.is_dir():
                self.found.links += 1
                return False
            is_file, reason = entry.is_file(), ""
        except OSError as error:  # a link to itself
            is_file, reason = False, f"cannot be opened ({error.strerror}); check it"
        if suffix in self.missing:
            self.found.missing[self.missing[suffix]] += 1
        elif suffix not in self.readable:
            self.found.others[_shown(suffix)] += 1
        elif is_file:
            return True
        elif entry.is_symlink():
            self._problem(entry.path, reason or "a broken link; fix or remove it")
        else:
            self._problem(entry.path, reason or "a pipe, a socket or a device, not a file; it was not opened")
        return False

    def _problem(self, path: str, what: str) -> None:
        self.found.problems.append(f"{name_of(path)}: {what}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # `_is_image` reports it
        return False


def _shown(suffix: str) -> str:
    return suffix if suffix.isprintable() and 1 < len(suffix) <= 10 else "without a suffix"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
