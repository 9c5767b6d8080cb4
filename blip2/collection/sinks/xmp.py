"""XMP sidecars as Immich, digiKam, darktable and Lightroom read them: a.jpg.xmp, or a.xmp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from blip2.collection.needs import need
from blip2.collection.record import Result, Source
from blip2.collection.sinks.packet import ALT_TEXT, DESCRIPTION, described, with_texts
from blip2.collection.sinks.places import Plain, check_beside, is_address, paths_of, write_all
from blip2.collection.wording import shortened
from blip2.errors import CollectionError

ALT_CHARS = 250
"""Maximum length of an alternative text in the standard, in characters."""
REMEDY = (
    "leave out --xmp-name stem, which uses the image's full name; or, if both are one photograph, give "
    "--xmp-shared"
)


class Xmp(Plain):
    """Writes the description and the alternative text. Everything else in a sidecar is kept, and the earlier file is
    saved as a.jpg.xmp_original. ``keeps_suffix``: a.jpg.xmp, else a.xmp. ``shares``: raw file and JPEG may share
    one."""

    def __init__(self, *, keeps_suffix: bool = True, shares: bool = False) -> None:
        super().__init__()
        need("defusedxml.ElementTree", "--xmp")
        self._keeps_suffix = keeps_suffix
        self._shares = shares

    def check(self, source: Source) -> None:
        images = paths_of(source)
        if images is None or any(map(is_address, images)):
            raise CollectionError("--xmp writes beside image files; for rows, shards and URLs give an output with -o")
        if self._shares:
            images = [*{self.path(image): image for image in images}.values()]
        check_beside(images, self.path, REMEDY)

    def path(self, image: str) -> Path:
        return Path(f"{image}.xmp") if self._keeps_suffix else Path(image).with_suffix(".xmp")

    def old(self, image: str) -> str:
        """The existing text of an image. Raises CollectionError for a sidecar that cannot be changed, OSError."""
        with suppress(FileNotFoundError):
            path = self.path(image)
            return described(path.read_bytes(), str(path))
        return ""

    def some(self, results: Sequence[Result]) -> None:
        write_all(change for result in results for change in self._changes(result))

    def _changes(self, result: Result) -> Iterator[tuple[Path, bytes]]:
        """The files to write, in order."""
        path = self.path(result.path)
        before = path.read_bytes() if path.exists() else None
        content = packet(before, result.line, str(path))
        if content == before:
            return
        original = path.with_name(f"{path.name}_original")
        if before is not None and not original.exists() and not _is_ours(before, str(path)):
            yield original, before
        yield path, content


def packet(before: bytes | None, line: str, name: str) -> bytes:
    return with_texts(before, {DESCRIPTION: line, ALT_TEXT: shortened(line, ALT_CHARS)}, name)


def _is_ours(content: bytes, name: str) -> bool:
    """Whether it only holds what an earlier run wrote."""
    return packet(None, described(content, name), name) == content
