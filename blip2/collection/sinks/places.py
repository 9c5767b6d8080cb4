"""Output locations, checked before the model is loaded: folders, permissions, disk space, and image names."""

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
    """Like `disk.written`, but with a fixed temporary name: a killed run leaves one file, which the next run
    overwrites, so that nothing is left over. Only one run at a time writes an output. Raises OSError."""
    with written(path, _unfinished(Path(os.path.realpath(path)))) as unfinished:
        yield unfinished


def write_all(contents: Iterable[tuple[Path, bytes]]) -> None:
    """Write many small files likewise, in this order: all are synced before the first is renamed.

    Each file appears with its whole content, or not at all. Raises OSError.
    """
    moves: dict[Path, Path] = {}
    try:
        for path, content in contents:
            place = Path(os.path.realpath(path))
            unfinished = _unfinished(place)
            moves[unfinished] = place
            unfinished.write_bytes(content)
            with suppress(FileNotFoundError):
                shutil.copymode(place, unfinished)  # keep the permissions
        replace([*moves.items()])
    finally:
        for unfinished in moves:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def _unfinished(place: Path) -> Path:
    return place.with_name(f".{place.name}.part")


class Plain:
    """A sink whose methods do nothing; the base of the others."""

    wants: frozenset[str] = frozenset()
    keeps_time = False

    def __init__(self) -> None:
        self.notes: list[str] = []

    def check(self, source: Source) -> None: ...

    def some(self, results: Sequence[Result]) -> None: ...

    def unit(self, unit: object, results: Sequence[Result]) -> None: ...

    def whole(self, results: Iterable[Result]) -> None: ...


def check_folder(folder: Path) -> None:
    """Check that a file can be created in the folder, or the folder itself. Raises CollectionError."""
    place = Path(os.path.abspath(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise CollectionError(f"{place}: is not a folder, so {folder} cannot be created; give another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CollectionError(f"{place}: is not writable; change its permissions, or give another output with -o")
    if shutil.disk_usage(place).free < MIN_FREE_BYTES:
        raise CollectionError(f"{place}: the disk is full; free some space, or give another output with -o")


def check_name(path: Path) -> None:
    """Check that this name and the longer temporary one beside it are possible. Raises CollectionError."""
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES - 1:  # the journal's name is one character longer
        raise CollectionError(f"{path}: a name of {len(os.fsencode(path.name))} bytes is too long; shorten it")


def check_file(path: Path, *, may_replace: bool) -> None:
    """Check that this file can be created and replaces no other. Raises CollectionError."""
    if path.is_dir():
        raise CollectionError(f"{path}: is a folder; name a file")
    if path.exists() and not may_replace:
        raise CollectionError(
            f"{path}: exists, and was not made by this command; give another output, or replace it with "
            "--if-exists overwrite"
        )
    check_folder(path.parent)


def paths_of(source: Source) -> Sequence[str] | None:
    """The images' files, if they have some; ``source`` is a `View`."""
    return getattr(source, "images", None)


def check_beside(images: Sequence[str], target: Callable[[str], Path], remedy: str) -> None:
    """Check that a separate file can be created beside each image. Raises CollectionError."""
    by_spelling: dict[tuple[str, str], dict[Path, str]] = defaultdict(dict)
    for image in images:
        path = target(image)
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            raise CollectionError(f"{path}: the name is longer than {MAX_NAME_BYTES} bytes; rename {image}")
        spelled = by_spelling[str(path.parent), _folded(path.name)]
        # The same file under two paths is no collision, nor are spellings that this file system distinguishes.
        for other_path, other in spelled.items():
            if other != image and (other_path == path or _is_blind(other) or _is_blind(image)):
                raise CollectionError(f"{path}: would belong to both {other} and {image}; {remedy}")
        spelled[path] = image
    for folder in dict.fromkeys(Path(image).parent for image in images):
        check_folder(folder)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_blind(image: str) -> bool:
    """Whether its file system treats other spellings of a name (case, composition) as the same file."""
    folder, name = os.path.split(image)
    others = {name.swapcase(), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))} - {name}
    for other in (os.path.join(folder, other) for other in others):
        if os.path.exists(other) and os.path.exists(image) and os.path.samefile(other, image):
            return True
    return False


def is_address(path: str) -> bool:
    return re.match(r"(?:[a-z][a-z0-9+.-]*://|data:)", path, re.IGNORECASE) is not None


def is_text(path: str) -> bool:
    """Whether a name is valid Unicode, as text formats need."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def relative(path: str, folder: Path) -> str:
    """A file's path relative to a folder, with "/"; "" if it is not in the folder."""
    if not path or is_address(path):
        return ""
    # Not resolved: a file that is linked into a folder is in it.
    found = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
    return "" if found.split(os.sep)[0] in (os.pardir, "") or os.path.isabs(found) else found.replace(os.sep, "/")


def absolute(path: str) -> str:
    return path if is_address(path) else os.path.abspath(path)
