"""Output formats. Each file of this package is one format, or a few of one kind.

    beside = open_beside(outputs)                     sidecars, XMP, exiftool: beside each image, or in it
    source = View(open_source(...), beside)           their existing content is the images' old text
    sinks = open_sinks(outputs, source, beside)       and the table or folder of shards given by -o
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blip2.collection.journal import Journal, is_folder
from blip2.collection.journal import beside as journal_beside
from blip2.collection.run import Sink
from blip2.collection.sinks import document, lines
from blip2.collection.sinks.exiftool import Embedded
from blip2.collection.sinks.parquet import Parquet
from blip2.collection.sinks.parts import ParquetParts
from blip2.collection.sinks.places import check_name, relative
from blip2.collection.sinks.shards import SHARD, Shards
from blip2.collection.sinks.sidecar import Sidecars
from blip2.collection.sinks.table import Format, Table
from blip2.collection.sinks.view import PerImageOutput, View
from blip2.collection.sinks.xmp import Xmp
from blip2.errors import OptionError

__all__ = ["FORMATS", "Outputs", "PerImageOutput", "View", "open_beside", "open_sinks"]

SUFFIXES = {
    "imagefolder": (".jsonl",), "jsonl": (".jsonl",), "train": (".jsonl",), "sd-scripts": (".jsonl",),
    "musubi": (".jsonl",), "invoke": (".jsonl",), "csv": (".csv",), "open-clip": (".tsv", ".csv"),
    "kohya": (".json",), "coco": (".json",), "coco-dataset": (".json",), "parquet": (".parquet", ""),
    "webdataset": ("",),
}  # fmt: skip
FORMATS = tuple(SUFFIXES)
Name = Literal["full", "stem"]
"""Names of a file beside an image: a.jpg.txt or a.txt."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The requested outputs, by the names of the flags.

    ``output``: a file, or a folder with one file per unit. ``format``: one of `FORMATS`, by default from the suffix.
    ``with_images``: embed images in parquet (default: no) and in shards (default: yes). ``replaces``: an existing file
    that no run of this command made may be replaced. ``constants``: columns with the same value everywhere, such as
    model and revision.
    """

    output: str = ""
    format: str = ""
    sidecar: str = ""
    sidecar_name: Name = "stem"
    xmp: bool = False
    xmp_name: Name = "full"
    xmp_shared: bool = False
    embed: bool = False
    with_images: bool | None = None
    caption_field: str = "txt"
    image_column: str = "file_name"
    caption_column: str = "text"
    csv_bom: bool = False
    shard_size: int = 10_000
    replaces: bool = False
    constants: Mapping[str, str] = field(default_factory=dict)


def open_beside(outputs: Outputs) -> list[PerImageOutput]:
    """The outputs beside each image, or in it. Raises OptionError, CollectionError."""
    found: list[PerImageOutput] = []
    if outputs.sidecar:
        if outputs.xmp and outputs.sidecar.lower().lstrip(".") == "xmp":
            raise OptionError("--sidecar .xmp and --xmp would write the same files; leave out one")
        found.append(Sidecars(outputs.sidecar, keeps_suffix=outputs.sidecar_name == "full"))
    if outputs.xmp:
        found.append(Xmp(keeps_suffix=outputs.xmp_name == "full", shares=outputs.xmp_shared))
    if outputs.embed:
        found.append(Embedded())
    return found


def open_sinks(outputs: Outputs, source: View, beside: Sequence[PerImageOutput] = ()) -> list[Sink]:
    """All requested outputs, checked before the model is loaded and before `Journal.begin`.

    Raises OptionError and CollectionError with a working alternative.
    """
    sinks: list[Sink] = [*beside]
    if outputs.output:
        sinks.append(_output(outputs, source))
    for sink in sinks:
        sink.check(source)
    return sinks


def _output(outputs: Outputs, source: View) -> Sink:
    path = Path(outputs.output)
    check_name(path)
    suffix = "" if is_folder(outputs.output) else path.suffix.lower()
    format = outputs.format or _by_suffix(path, suffix, source)
    if format not in SUFFIXES:
        raise OptionError(f"--format {format}: unknown format; use {', '.join(FORMATS)}")
    if suffix not in SUFFIXES[format]:
        wanted = " or ".join(f"a file *{known}" if known else "a folder" for known in SUFFIXES[format])
        raise OptionError(f"{path}: --format {format} writes {wanted}; change the output")
    if outputs.with_images is not None and format not in ("parquet", "webdataset"):
        raise OptionError(f"--with-images and --no-images: --format {format} has no images; parquet and webdataset do")
    if path.name.lower() == "metadata.csv":
        raise OptionError(
            f"{path}: datasets reads captions such as None or NA in a CSV as missing; name it metadata.jsonl"
        )
    images, constants = outputs.with_images, outputs.constants
    replaces = outputs.replaces or bool(Journal(journal_beside(outputs.output)).written)
    if format == "webdataset":
        return Shards(
            path, constants, caption_field=outputs.caption_field, images=images is not False,
            shard_size=outputs.shard_size,
        )  # fmt: skip
    if format == "parquet" and not suffix:
        return ParquetParts(path, constants, images=bool(images))
    if format == "parquet":
        return Parquet(path, constants, images=bool(images), may_replace=replaces)
    return Table(path, _format(format, outputs), may_replace=replaces)


def _format(name: str, outputs: Outputs) -> Format:
    if name == "jsonl":
        return lines.json_format(outputs.constants)
    if name == "csv":
        return lines.csv_format(outputs.image_column, outputs.caption_column, marks=outputs.csv_bom)
    return {**lines.FORMATS, **document.FORMATS}[name]


def _by_suffix(path: Path, suffix: str, source: View) -> str:
    match suffix:
        case ".jsonl":
            images = source.images
            are_below = images is not None and all(relative(image, path.parent) for image in images)
            return "imagefolder" if are_below or path.name == "metadata.jsonl" else "jsonl"
        case ".csv" | ".parquet":
            return suffix[1:]
        case ".tsv":
            return "open-clip"
        case ".json":
            raise OptionError(f"{path}: add --format coco, coco-dataset or kohya")
        case "":
            places = [unit.place for unit in source.units[:1]]
            if any(SHARD.search(place) for place in places):
                return "webdataset"
            if any(Path(place).suffix in (".parquet", ".pq") for place in places):
                return "parquet"
            raise OptionError(f"{path}: is a folder; add --format webdataset or parquet, or name a file")
    raise OptionError(f"{path}: unknown suffix {suffix}; name it *.jsonl, *.json, *.csv, *.tsv or *.parquet")
