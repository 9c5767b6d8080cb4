"""Descriptions inside image files, written by exiftool: only metadata change, no pixel is encoded again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from blip2.collection.record import SUCCESS, Result, Source
from blip2.collection.sinks.places import Plain, check_folder, is_address, paths_of
from blip2.collection.sinks.xmp import ALT_CHARS
from blip2.collection.wording import shortened
from blip2.errors import CollectionError
from blip2.image import named_format

INSTALL = {
    "darwin": "brew install exiftool",
    "win32": "winget install OliverBetz.ExifTool",
}
INSTALL_ELSEWHERE = "apt install libimage-exiftool-perl (or perl-Image-ExifTool)"
WRITABLE = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".gif"})
TEMPORARY = "_exiftool_tmp"
CHUNK = 512


class Embedded(Plain):
    """Writes the description as the Metadata Working Group prescribes (EXIF and XMP; IPTC if the file has some), and
    the alternative text. Files keep their modification time, not their size. exiftool runs once per unit."""

    keeps_time = True

    def __init__(self) -> None:
        super().__init__()
        found = shutil.which("exiftool")
        if found is None:
            line = INSTALL.get(sys.platform, INSTALL_ELSEWHERE)
            raise CollectionError(f"--embed needs exiftool, which is not on the PATH: {line}; or use --xmp")
        self._exiftool = found
        self._old: dict[str, str] = {}

    def check(self, source: Source) -> None:
        images = paths_of(source)
        if images is None or any(map(is_address, images)):
            raise CollectionError("--embed writes into image files; for rows, shards and URLs give an output with -o")
        for image in images:
            if "\n" in image or "\r" in image:
                raise CollectionError(f"{image!r}: exiftool cannot take a name with a line break; rename it")
            if Path(image).suffix.lower() not in WRITABLE:
                raise CollectionError(f"{image}: exiftool cannot write this file type; convert it, or use --xmp")
        for folder in dict.fromkeys(Path(image).parent for image in images):
            check_folder(folder)
        self._old = self._read(images)

    def old(self, image: str) -> str:
        """The text in an image file at the time of the check. Raises CollectionError for one that exiftool refuses."""
        kind = named_format(image)
        if kind is not None and Path(image).suffix.lower() not in kind[1]:
            raise CollectionError(
                f"{image}: contains {kind[0]}, and exiftool refuses a file with another suffix; "
                f"rename it to {kind[1][0]}"
            )
        return self._old.get(image, "")

    def unit(self, unit: object, results: Sequence[Result]) -> None:
        wanted = [result for result in results if result.status == SUCCESS]
        for result in wanted:  # left by a run that was killed
            Path(result.path + TEMPORARY).unlink(missing_ok=True)
        for start in range(0, len(wanted), CHUNK):
            self._write(wanted[start : start + CHUNK])

    def _write(self, results: Sequence[Result]) -> None:
        output = self._run(
            [
                [
                    f"-MWG:Description={result.line}",
                    f"-XMP-iptcCore:AltTextAccessibility={shortened(result.line, ALT_CHARS)}",
                    os.path.abspath(result.path),
                ]
                for result in results
            ],
            ["-P", "-overwrite_original"],
        )
        lines = output.decode("utf-8", "replace").splitlines()
        problems = [line for line in lines if line.startswith("Error")]
        self.notes += [f"not embedded: {problem}" for problem in problems]
        num_written = sum(line.strip().startswith("1 image files updated") for line in lines)
        if num_written + len(problems) < len(results):
            raise OSError(f"exiftool wrote to {num_written} of {len(results)} images: {' '.join(lines)[-300:]}")

    def _read(self, images: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for start in range(0, len(images), CHUNK):
            some = {os.path.abspath(image): image for image in images[start : start + CHUNK]}
            output = self._run([["-j", "-fast", "-MWG:Description", *some]], [])
            # Names that are not UTF-8 are returned unchanged.
            text = output.decode("utf-8", "surrogateescape")
            if "[" not in text:
                continue
            try:
                rows = json.loads(text[text.index("[") : text.rindex("]") + 1])
            except ValueError:
                problem = f"exiftool gave unexpected output: {text[:200]!r}"
                raise CollectionError(f"{problem}; try another version") from None
            for row in rows:
                if (image := some.get(row["SourceFile"])) is not None and "Description" in row:
                    found[image] = " ".join(str(row["Description"]).split())
        return found

    def _run(self, commands: Iterable[Sequence[str]], common: Sequence[str]) -> bytes:
        """The output of exiftool. Arguments go through a pipe, so that there may be many, with any bytes."""
        lines = [line for command in commands for line in [*command, "-execute"]]
        command = [self._exiftool, "-charset", "filename=UTF8", "-@", "-", "-common_args", "-use", "MWG", *common]
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        return subprocess.run(command, input=content, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
