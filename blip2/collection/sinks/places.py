"""Where outputs go, looked at before the model is loaded: folders, rights, room, and the names of images."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from blip2.collection.record import Result, Source
from blip2.disk import replace, written
from blip2.errors import CollectionError

MIN_FREE_BYTES = 2**20
MAX_NAME_BYTES = 255 - len("..part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`disk.written`, always under the same name: a run that was killed leaves a file, and the next one writes it anew
    and moves it to its place, so that nothing of it stays. Only one run at a time writes an output. Raises OSError."""
    with written(path, _unfinished(Path(os.path.realpath(path)))) as unfinished:
        yield unfinished


def write_all(contents: Iterable[tuple[Path, bytes]]) -> None:
    """Many small files, likewise, in this order: all are safe on the disk before the first has its name.

    Each has its name with all of its content, or not at all. Raises OSError.
    """
    moves: dict[Path, Path] = {}
    try:
        for path, content in contents:
            place = Path(os.path.realpath(path))
            unfinished = _unfinished(place)
            moves[unfinished] = place
            unfinished.write_bytes(content)
            with suppress(FileNotFoundError):
                shutil.copymode(place, unfinished)  # what was private stays so
        replace([*moves.items()])
    finally:
        for unfinished in moves:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def _unfinished(place: Path) -> Path:
    return place.with_name(f".{place.name}.part")


class Plain:
    """What sinks do where they do nothing."""

    wants: frozenset[str] = frozenset()
    keeps_time = False

    def __init__(self) -> None:
        self.notes: list[str] = []

    def check(self, source: Source) -> None: ...

    def some(self, results: Sequence[Result]) -> None: ...

    def unit(self, unit: object, results: Sequence[Result]) -> None: ...

    def whole(self, results: Iterable[Result]) -> None: ...


def check_folder(folder: Path) -> None:
    """That a file can be made there, or in the folder that it would be made in. Raises CollectionError."""
    place = Path(os.path.abspath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise CollectionError(f"{place}: is no folder, so nothing can be written into {folder}; give another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CollectionError(f"{place}: cannot be written; change its rights, or give an output elsewhere by -o")
    if shutil.disk_usage(place).free < MIN_FREE_BYTES:
        raise CollectionError(f"{place}: the disk is full; make room, or give an output elsewhere by -o")


def check_name(path: Path) -> None:
    """That a file, and what lies beside it while it is made, can have such a name. Raises CollectionError."""
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES - 1:  # the journal's has a letter more
        raise CollectionError(f"{path}: a name of {len(os.fsencode(path.name))} bytes is too long; give a shorter one")


def check_file(path: Path, *, may_replace: bool) -> None:
    """That a file of this name can be made, and no other is lost by it. Raises CollectionError."""
    if path.is_dir():
        raise CollectionError(f"{path}: is a folder; name a file")
    if path.exists() and not may_replace:
        raise CollectionError(
            f"{path}: is there already, and no run of this command made it; give another output, or replace it by "
            "--if-exists overwrite"
        )
    check_folder(path.parent)


def paths_of(source: Source) -> Sequence[str] | None:
    """The images' files, where they have some; ``source`` is a `View`."""
    return getattr(source, "pictures", None)


def check_beside(pictures: Sequence[str], target: Callable[[str], Path], remedy: str) -> None:
    """That a file can be made beside each image, each its own. Raises CollectionError."""
    by_spelling: dict[tuple[str, str], dict[Path, str]] = defaultdict(dict)
    for picture in pictures:
        path = target(picture)
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            raise CollectionError(f"{path}: a name of more than {MAX_NAME_BYTES} bytes; give {picture} a shorter one")
        spelled = by_spelling[str(path.parent), _folded(path.name)]
        # One file under two paths is no collision, nor are spellings that this file system tells apart.
        for other_path, other in spelled.items():
            if other != picture and (other_path == path or _is_blind(other) or _is_blind(picture)):
                raise CollectionError(f"{path}: would be that of {other} and of {picture}; {remedy}")
        spelled[path] = picture
    for folder in dict.fromkeys(Path(picture).parent for picture in pictures):
        check_folder(folder)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_blind(picture: str) -> bool:
    """Whether its file system takes other spellings of a name (case, composition) for the same."""
    folder, name = os.path.split(picture)
    others = {name.swapcase(), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))} - {name}
    for other in (os.path.join(folder, other) for other in others):
        if os.path.exists(other) and os.path.exists(picture) and os.path.samefile(other, picture):
            return True
    return False


def is_address(path: str) -> bool:
    return re.match(r"(?:[a-z][a-z0-9+.-]*://|data:)", path, re.IGNORECASE) is not None


def is_text(path: str) -> bool:
    """Whether a name is Unicode, as formats of text need it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def relative(path: str, folder: Path) -> str:
    """A file's path from a folder, with "/"; "" if it does not lie in it."""
    if not path or is_address(path):
        return ""
    # Not resolved: what people put into a folder by a link lies there.
    found = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
    return "" if found.split(os.sep)[0] in (os.pardir, "") or os.path.isabs(found) else found.replace(os.sep, "/")


def absolute(path: str) -> str:
    return path if is_address(path) else os.path.abspath(path)
