"""Formats of one JSON document: COCO results and data sets, and kohya's metadata. Written image by image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any

from blip2.collection.record import Result
from blip2.collection.sinks.lines import named, size_and_tags, whole_path
from blip2.collection.sinks.places import absolute, relative
from blip2.collection.sinks.table import Format
from blip2.errors import CollectionError

REMEDY = "give --format coco-dataset, which numbers them"


def image_id(result: Result) -> int | None:
    """The COCO id of an image: the source's, or the digits at the end of the file name, as in COCO's own names."""
    for column in ("image_id", "cocoid", "id"):
        if re.fullmatch(r"\d{1,18}", str(result.columns.get(column, ""))):
            return int(result.columns[column])
    stem = PurePath(result.key).stem if re.search(r"\.[A-Za-z]\w*$", result.key) else PurePath(result.key).name
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{1,18})", stem)
    return int(found[1]) if found else None


def numbered(result: Result) -> int:
    """A result with an image id. Raises CollectionError for an image without one."""
    if (number := image_id(result)) is None:
        raise CollectionError(f"{result.name}: has no image id, which COCO results need; {REMEDY}")
    return number


def _coco(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    owners: dict[int, str] = {}

    def entries() -> Iterator[str]:
        for result in named(results):
            number = numbered(result)
            if number in owners:
                raise CollectionError(f"{owners[number]} and {result.name} have the same image id {number}; {REMEDY}")
            owners[number] = result.name
            yield json.dumps({"image_id": number, "caption": result.line}, ensure_ascii=False)

    write_joined(file, "[", entries(), "]\n")
    if not owners:
        raise CollectionError("no image has a caption, and COCO's tools reject an empty list; nothing was written")
    return ()


def _coco_dataset(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    numbers = [image_id(result) for result in named(results)]
    if None in numbers or len({*numbers}) < len(numbers):
        numbers = [*range(1, len(numbers) + 1)]

    def images() -> Iterator[str]:
        for number, result in zip(numbers, named(results), strict=True):
            name = relative(result.path, folder) or (absolute(result.path) if result.path else result.key)
            size = {"width": result.width, "height": result.height}
            yield json.dumps({"id": number, "file_name": name, **size}, ensure_ascii=False)

    def annotations() -> Iterator[str]:
        running = 0
        for number, result in zip(numbers, named(results), strict=True):
            for line in result.lines:
                running += 1
                yield json.dumps({"id": running, "image_id": number, "caption": line}, ensure_ascii=False)

    write_joined(file, '{"info": {}, "licenses": [], "images": [', images(), "],\n")
    write_joined(file, '"annotations": [', annotations(), "]}\n")
    return ()


def _kohya(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    """Keys are whole paths: current trainers find no image by a name without its suffix."""

    def entry(result: Result) -> str:
        key = json.dumps(whole_path(result))
        value: Mapping[str, Any] = {"caption": result.line, **size_and_tags(result)}
        return f"{key}: {json.dumps(value, indent=2)}"

    write_joined(file, "{", map(entry, named(results)), "}\n")
    return ()


def write_joined(file: IO[str], start: str, entries: Iterator[str], end: str) -> None:
    file.write(start)
    for number, entry in enumerate(entries):
        file.write((",\n" if number else "\n") + entry)
    file.write("\n" + end)


FORMATS = {
    "coco": Format(_coco, paths="", probe=numbered),
    "coco-dataset": Format(_coco_dataset, paths="named", wants=frozenset({"size"})),
    "kohya": Format(_kohya, wants=frozenset({"size"})),
}
