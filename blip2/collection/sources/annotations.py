"""JSON annotation files of other tools, converted to our rows: one per image.

    COCO            {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy's      {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}
    kohya's         {"name or path": {"caption", "tags"}}
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blip2.data.folders import find_in
from blip2.errors import CollectionError, option
from blip2.image import suffixes

FILE, CAPTIONS = "file_name", "captions"
KOHYA = {"caption", "tags", "image_size"}


def rows_of(value: object, path: str, images: str | None, split: str | None) -> list[object] | None:
    """The rows, each with `FILE`; a text instead of a row says what is wrong with it. None if the value is of no known
    tool. ``images``: the folder of the images. ``split``: a split of a Karpathy file, or several separated by commas.
    Raises CollectionError."""
    if not isinstance(value, Mapping):
        return None
    listed = value.get("images")
    if isinstance(listed, list) and listed:
        if any(isinstance(image, dict) and "filename" in image for image in listed):
            return list(_karpathy(listed, path, split))
        if any(isinstance(image, dict) and FILE in image for image in listed):
            refuse_split(split, path)
            return list(_coco(listed, value.get("annotations", []), path))
    entries = value.values()
    if all(isinstance(entry, dict) for entry in entries) and any(entry.keys() & KOHYA for entry in entries):
        refuse_split(split, path)
        return list(_kohya(value, images if images is not None else os.path.dirname(path) or "."))
    return None


def _coco(images: Sequence[object], annotations: object, path: str) -> Iterator[object]:
    """``image_id`` keeps its type."""
    captions: dict[object, list[str]] = defaultdict(list)
    for entry in annotations if isinstance(annotations, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("caption"), str) and _is_id(entry.get("image_id")):
            captions[entry["image_id"]].append(entry["caption"])
    seen: set[object] = set()
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get(FILE), str) or not _is_id(image.get("id")):
            yield f"an image needs 'id' and {FILE!r}"
            continue
        if image["id"] in seen:
            raise CollectionError(f"{path}: two images have the id {image['id']!r}; ids have to be unique")
        seen.add(image["id"])
        rest = {name: value for name, value in image.items() if name not in (FILE, "id")}
        yield {FILE: image[FILE], "image_id": image["id"], **rest, CAPTIONS: captions.get(image["id"], [])}


def _karpathy(images: Sequence[object], path: str, split: str | None) -> Iterator[object]:
    """``image_id``: COCO's, or the running number in the file."""
    wanted = split.split(",") if split else None
    found = Counter(str(image.get("split", "")) for image in images if isinstance(image, dict))
    for name in wanted or ():
        if name not in found:
            known = ", ".join(f"{other} ({count:,})" for other, count in found.items())
            raise CollectionError(f"{path}: has no split {name!r}, but {known}")
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield "an image needs 'filename'"
            continue
        if wanted and str(image.get("split", "")) not in wanted:
            continue
        row: dict[str, Any] = {FILE: os.path.join(str(image.get("filepath") or ""), image["filename"])}
        if _is_id(number := image.get("cocoid", image.get("imgid"))):
            row["image_id"] = number
        if "split" in image:
            row["split"] = image["split"]
        entry = image.get("sentences")
        captions = [one.get("raw") for one in entry if isinstance(one, dict)] if isinstance(entry, list) else []
        yield {**row, CAPTIONS: [caption for caption in captions if isinstance(caption, str)]}


def _kohya(entry: Mapping[str, Mapping[str, Any]], folder: str) -> Iterator[object]:
    """A key is a path, or the name of an image without its suffix."""
    readable, missing = suffixes()
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in find_in([folder], recursive=False).images:
        name = os.path.basename(image)
        by_stem[os.path.splitext(name)[0]].append(name)
    for key, columns in entry.items():
        if os.path.splitext(key)[1].lower() in {*readable, *missing}:
            yield {**columns, FILE: key}
        elif len(some := by_stem.get(key, [])) == 1:
            yield {**columns, FILE: some[0]}
        elif some:
            yield f"{key!r} could be {' or '.join(some)}; write keys with suffixes"
        else:
            yield f"{key!r}: there is no image of this name in {folder}; name their folder with {option('images')}"


def refuse_split(split: str | None, path: str) -> None:
    if split:
        raise CollectionError(f"{path}: has no splits; leave out {option('split')}, which is for Karpathy files")


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
