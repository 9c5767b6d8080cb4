"""A text file beside each image, as LoRA trainers read it: UTF-8, one line per caption, never empty."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blip2.collection.record import Result, Source
from blip2.collection.sinks.places import Plain, check_beside, is_address, paths_of, write_all
from blip2.errors import CollectionError, OptionError
from blip2.image import suffixes
from blip2.plaintext import read_text

REMEDY = "add --sidecar-name full, which uses the image's full name, or rename one of them"


class Sidecars(Plain):
    """``suffix``: ".txt", ".caption". ``keeps_suffix``: a.jpg.txt instead of a.txt."""

    def __init__(self, suffix: str, *, keeps_suffix: bool = False) -> None:
        super().__init__()
        self._suffix = suffix if suffix.startswith(".") else f".{suffix}"
        self._keeps_suffix = keeps_suffix
        readable, others = suffixes()
        if self._suffix.lower() in {*readable, *others}:
            raise OptionError(f"--sidecar {suffix}: is a suffix of images; give .txt or .caption")
        if self._suffix == "." or any(character in "/\\\0" or not character.isprintable() for character in suffix):
            raise OptionError(f"--sidecar {suffix!r}: is not a suffix; give .txt or .caption")

    def check(self, source: Source) -> None:
        if (images := paths_of(source)) is None:
            raise CollectionError("--sidecar writes beside image files; for rows and shards give an output with -o")
        if addresses := [image for image in images if is_address(image)]:
            raise CollectionError(f"{addresses[0]}: --sidecar writes beside image files; give an output with -o")
        check_beside(images, self.path, REMEDY)

    def path(self, image: str) -> Path:
        return Path(image + self._suffix) if self._keeps_suffix else Path(image).with_suffix(self._suffix)

    def old(self, image: str) -> str:
        """The lines of an existing sidecar. Raises OSError, NotTextError."""
        with suppress(FileNotFoundError):
            lines = (" ".join(line.split()) for line in read_text(self.path(image)).split("\n"))
            return "\n".join(filter(None, lines))
        return ""

    def some(self, results: Sequence[Result]) -> None:
        write_all(
            (self.path(result.path), "".join(f"{line}\n" for line in result.lines).encode("utf-8"))
            for result in results
        )
