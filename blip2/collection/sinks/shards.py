"""Shards in img2dataset's layout: 00000.tar, 00000.parquet, and last 00000_stats.json, for every unit.

Source shards are mirrored: members are copied unchanged, with the captions beside them. Images of other sources are
packed under numbers as keys: a dot in a tar name begins the field, so that IMG.1.jpg and IMG.2.jpg would be one sample.
`datasets` rejects shards whose samples have different members, so all samples get the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from blip2.collection.needs import need
from blip2.collection.record import FAILED, SKIPPED, Record, Result, Source, Unit
from blip2.collection.sinks.lines import everything
from blip2.collection.sinks.parquet import write_parquet
from blip2.collection.sinks.places import Plain, check_folder, replacing, write_all
from blip2.collection.sinks.samples import (
    EMPTY_MEMBERS,
    Sample,
    fields_of,
    image_field,
    samples,
    write_samples,
)
from blip2.errors import CollectionError
from blip2.image import suffixes

SHARD = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)


class Shards(Plain):
    """``caption_field``: the member that holds the caption; its earlier content goes to orig.txt (``orig.`` and the
    field). ``images``: if False, only write the tables. ``shard_size``: images per unit, where images are packed."""

    wants = frozenset({"size", "sha256"})

    def __init__(
        self,
        folder: Path,
        constants: Mapping[str, str],
        *,
        caption_field: str = "txt",
        images: bool = True,
        shard_size: int = 10_000,
    ) -> None:
        super().__init__()
        need("pyarrow.parquet", "the table of a shard")
        self._folder = folder
        self._constants = constants
        self._caption_field = caption_field
        self._images = images
        self._digits = max(4, len(str(shard_size - 1)))
        self._source: Source | None = None
        self._image_field = "jpg"

    def check(self, source: Source) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise CollectionError(f"{self._folder}: is a file; shards need a folder")
        check_folder(self._folder)
        self._source = source
        owners: dict[str, str] = {}
        for unit in source.units:
            name = self._name(unit)
            if name in owners:
                raise CollectionError(
                    f"{owners[name]} and {unit.place} would both become {self._folder / name}.tar; process them "
                    "separately, each with its own output, or rename one"
                )
            owners[name] = unit.place
            target = self._folder / f"{name}.tar"
            if _is_shard(unit) and target.exists() and target.samefile(unit.place):
                raise CollectionError(f"{unit.place}: is the source itself; give another folder with -o")
        self._image_field = next(self._image_fields(source), "jpg")

    def unit(self, unit: object, results: Sequence[Result]) -> None:
        assert isinstance(unit, Unit) and self._source is not None, "check comes first"
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._name(unit)
        keys = [result.key for result in results]
        if not _is_shard(unit):
            keys = [f"{name}{number:0{self._digits}}" for number in range(len(results))]
        if self._images:
            self._write_tar(unit, name, dict(zip(keys, results, strict=True)))
        own_keys = iter(keys)

        def row(result: Result) -> dict[str, Any]:
            return {**everything(self._constants, result, self._folder), "key": next(own_keys)}

        write_parquet(self._folder / f"{name}.parquet", results, row, self._constants)
        stats = _stats(unit, results)
        write_all([(self._folder / f"{name}_stats.json", f"{json.dumps(stats, indent=4)}\n".encode("ascii"))])

    def _name(self, unit: Unit) -> str:
        """The name of the source's shard, or the unit's number."""
        return SHARD.sub("", Path(unit.place).name) if _is_shard(unit) else f"{unit.number:05}"

    def _write_tar(self, unit: Unit, name: str, results: Mapping[str, Result]) -> None:
        found = self._copied(unit, results) if _is_shard(unit) else self._packed(unit, results)
        with replacing(self._folder / f"{name}.tar") as unfinished:
            write_samples(unfinished, found)

    def _copied(self, unit: Unit, results: Mapping[str, Result]) -> Iterator[Sample]:
        """The samples of a source shard that have a caption, with the caption."""
        assert self._source is not None
        path, own = Path(unit.place), self._caption_field
        chosen = str(self._source.description().get("image_column", ""))
        any_has, all_have = fields_of(path)
        filled = {field: EMPTY_MEMBERS[kind] for field in any_has - all_have
                  if (kind := field.lower().rpartition(".")[2]) in EMPTY_MEMBERS}  # fmt: skip
        if rare := sorted(any_has - all_have - {*filled, own} - {field for field in any_has if image_field({field})}):
            self.notes.append(
                f"{path.name}: some samples only have {', '.join(rare)}; webdataset reads them, datasets does not"
            )
        for sample in self._sound(path):
            result = results.get(sample.key)
            if result is None or not result.line:
                continue
            before = sample.members.get(own, b"")
            earlier = {f"orig.{own}": before} if own == "txt" or own in any_has else {}
            members = {**filled, **earlier, **sample.members}
            image = chosen if chosen in sample.members else image_field(sample.members)
            if image:
                members[self._image_field] = members.pop(image)
            is_kept = result.status == SKIPPED and before.strip()  # else the text came from another field
            members[own] = before if is_kept else result.line.encode("utf-8")
            yield Sample(sample.key, members)

    def _sound(self, path: Path) -> Iterator[Sample]:
        """The samples before the first damage. The records behind it report the damage, too."""
        try:
            yield from samples(path)
        except CollectionError as error:
            self.notes.append(str(error))

    def _packed(self, unit: Unit, results: Mapping[str, Result]) -> Iterator[Sample]:
        """A sample for each image that has a caption: the image, the caption, and its metadata."""
        assert self._source is not None
        records: Iterator[Record] = iter(self._source.records(unit))
        for key, result in results.items():
            record = next((record for record in records if record.key == result.key), None)
            if not result.line:
                continue
            if record is None or record.image is None:
                raise CollectionError(f"{result.name}: is no longer in the source; repeat the command")
            image = Path(record.image).read_bytes() if isinstance(record.image, str) else record.image
            content: dict[str, Any] = {
                "key": key,
                "name": result.key,
                "caption": result.line,
                "caption_original": result.old,
            }
            content = {**result.columns, **content, "width": result.width, "height": result.height}
            yield Sample(key, {
                self._image_field: image,
                self._caption_field: result.line.encode("utf-8"),
                "json": json.dumps(content).encode("ascii"),
            })  # fmt: skip

    def _image_fields(self, source: Source) -> Iterator[str]:
        """The field name of the first image, used for all: readers detect the image format from the bytes."""
        for unit in source.units:
            if _is_shard(unit):
                chosen = str(source.description().get("image_column", ""))
                name = chosen or next((image_field(found.members) for found in self._sound(Path(unit.place))), "")
            else:
                name = next((_suffix(record) for record in source.records(unit)), "")
            if name:
                yield {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg"}.get(name.lower(), name.lower())


def _is_shard(unit: Unit) -> bool:
    return SHARD.search(unit.place) is not None and Path(unit.place).is_file()


def _suffix(record: Record) -> str:
    readable, _ = suffixes()
    suffix = Path(record.image if isinstance(record.image, str) else record.key).suffix.lower()
    return suffix[1:] if suffix in readable else ""


def _stats(unit: Unit, results: Sequence[Result]) -> dict[str, Any]:
    """Statistics in img2dataset's form, which sums them; those of the source's download are kept. Contains no time, so
    that an interrupted and resumed run writes the same."""
    before: dict[str, Any] = {}
    if _is_shard(unit):
        path = Path(unit.place)
        with suppress(OSError, ValueError):
            found = json.loads(path.with_name(f"{SHARD.sub('', path.name)}_stats.json").read_text("utf-8"))
            before = found if isinstance(found, dict) else {}
    statuses = Counter(result.status for result in results)
    failed = {name: _count(before.get(name)) for name in ("failed_to_download", "failed_to_resize")}
    return {
        "count": len(results) + sum(failed.values()),
        "successes": len(results) - statuses[FAILED],
        **failed,
        "failed_to_caption": statuses[FAILED],
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": dict(sorted(statuses.items())),
    }


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
