"""The pictures in a folder and in the folders within: one reader for all who take a folder.

One bad entry does not stop the rest. What should be a picture and cannot be one is a problem, told by its name; what is
none is counted, so that nothing is passed over without a word.
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
"""Of files that are no pictures, told one by one; the others are only counted."""


@dataclass
class Found:
    """What is in folders. Hidden entries and what is excluded are not counted."""

    pictures: list[str] = field(default_factory=list)
    """Paths; those of a folder in order of their names."""
    problems: list[str] = field(default_factory=list)
    """A line for each entry that could not be looked at."""
    unknown: list[str] = field(default_factory=list)
    """Folders that could not be read, or are empty, as the place of a drive is that is not there."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are no pictures, by their suffix."""
    links: int = 0
    """Links to folders; they are not followed, because they may lead in circles."""
    missing: Counter[str] = field(default_factory=Counter)
    """Pictures of a format that this installation lacks, by what to install."""

    @property
    def is_complete(self) -> bool:
        """Whether all pictures that are there are among `pictures`."""
        return not (self.problems or self.missing)

    def passed_over(self, apart: Collection[str] = ()) -> str:
        """One line, or nothing if it was nothing. ``apart``: suffixes of files that are not told of."""
        told = [f"{_number(count, 'picture')} ({needed} reads them)" for needed, count in self.missing.items()]
        others = Counter({suffix: count for suffix, count in self.others.items() if suffix not in apart})
        if others:
            kinds = [f"{count:,} {suffix}" for suffix, count in others.most_common(MOST_KINDS)]
            kinds += ["..."] if len(others) > MOST_KINDS else []
            told.append(f"{_number(others.total(), 'other file')} ({', '.join(kinds)})")
        if self.links:
            told.append(_number(self.links, "linked folder"))
        return f"passed over in folders: {', '.join(told)}" if told else ""


def find_in(places: Iterable[str], *, recursive: bool = True, exclude: Iterable[str] = ()) -> Found:
    """The pictures in folders, by the suffixes of what can be read here; a place that is no folder is taken as it is.

    ``exclude``: patterns as shells have them ("lost+found", "*.gif"), of a name or of a path within its folder; what
    they fit is left out. Never opens a file, so that nothing waits for a pipe. Raises nothing: a folder without
    pictures, or one that cannot be read, is a problem.
    """
    found, patterns = Found(), list(exclude)
    for place in places:
        if os.path.isdir(place):
            _Walk(place, recursive, patterns, found, *suffixes()).run()
        else:
            found.pictures.append(place)
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
    """Folders that were not looked into, because nobody asked for it."""

    def run(self) -> None:
        pictures: list[str] = []
        num_told = self._num_told()
        waiting = [self.top]
        while waiting:
            place = waiting.pop()
            try:
                with os.scandir(place) as listed:
                    entries = list(listed)
            except OSError as error:
                self.found.unknown.append(place)
                self._problem(place, f"this folder cannot be read ({error.strerror}); check its rights")
                continue
            for entry in entries:
                if entry.name.startswith(".") or self._is_excluded(entry):  # hidden: thumbnails and the like
                    continue
                if _is_folder(entry):
                    if self.recursive:
                        waiting.append(entry.path)
                    else:
                        self.num_left += 1
                elif self._is_picture(entry):
                    pictures.append(entry.path)
        self.found.pictures += sorted(pictures)
        if not pictures and self._num_told() == num_told:
            hint = "; the folders within it were not looked into" if self.num_left else ""
            self.found.unknown.append(self.top)
            self._problem(self.top, f"there are no pictures in this folder{hint}")

    def _num_told(self) -> int:
        """Of pictures and folders that cannot be read."""
        return len(self.found.problems) + self.found.missing.total()

    def _is_excluded(self, entry: os.DirEntry[str]) -> bool:
        within = os.path.relpath(entry.path, self.top) if self.exclude else ""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (entry.name, within))

    def _is_picture(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry that is no folder is a picture that can be read; if not, it is counted."""
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
            self._problem(entry.path, reason or "a link to what is not there; mend or remove it")
        else:
            self._problem(entry.path, reason or "a pipe, a socket or a device, no file; it was not opened")
        return False

    def _problem(self, path: str, what: str) -> None:
        self.found.problems.append(f"{name_of(path)}: {what}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # `_is_picture` tells of it
        return False


def _shown(suffix: str) -> str:
    return suffix if suffix.isprintable() and 1 < len(suffix) <= 10 else "without a suffix"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
