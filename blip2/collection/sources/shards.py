"""Shards: tar files in webdataset's layout, read from the first member to the last with one image in memory.

A member's name up to the first dot of its last part is the key of its sample, the rest is the field: ``a.b/c.jpg`` is
the field ``jpg`` of ``a.b/c``. The members of a sample are adjacent.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from blip2.collection.record import Record, Unit
from blip2.collection.sources import tarball
from blip2.collection.sources.tables import parsed
from blip2.collection.sources.tarball import Damage, Member
from blip2.disk import stamp_of
from blip2.errors import CollectionError, option
from blip2.image import suffixes

KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
META = re.compile(r"__[^/]*__($|/)")
TEXT_FIELDS = ("txt", "text", "caption")
JSON_FIELD, JSON_CAPTION = "json", "caption"
HEAD_MEMBERS = 1000
"""Number of members of the first shard that are checked before a run if it is compressed; all if it is not."""
LARGEST_IMAGE, LARGEST_TEXT = 2**30, 2**26
"""Maximum bytes of a member; a larger one is damaged."""


class Shards:
    """``image_field`` and ``text_field``: the members that hold image and text, detected by default. Raises
    CollectionError for a file that is not a tar file. No file is opened before all are known to be files."""

    def __init__(self, paths: Sequence[str], *, image_field: str | None = None, text_field: str | None = None) -> None:
        for path in paths:
            _check_file(path)
        self.paths = paths
        self._image_field = image_field.lower().lstrip(".") if image_field else None
        self._text_field = text_field.lower().lstrip(".") if text_field else None
        self._root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        self._readable, self._missing = suffixes()
        self.units = [Unit(number, path) for number, path in enumerate(paths)]
        self._stamps = [self._stamp(path) for path in paths]
        self._check_first()

    @property
    def num_records(self) -> int | None:
        """The number that img2dataset stored beside each shard; None if that is missing."""
        return _count_of_img2dataset(self.paths)

    def stamp(self, unit: Unit) -> str:
        return self._stamps[unit.number]

    def records(self, unit: Unit) -> Iterator[Record]:
        """Raises CollectionError for a shard in which the members of a sample are not adjacent."""
        sample: _Sample | None = None
        seen: set[str] = set()
        try:
            for member, key, name in self._members(unit.place):
                if sample is None or key != sample.key:
                    if sample is not None and not self._is_meta(sample):
                        yield self._record(unit.place, sample)
                    if key in seen:
                        raise self._fragmented(unit.place, key)
                    seen.add(key)
                    sample = _Sample(key)
                self._take(sample, member, name)
        except Damage as damage:
            if sample is not None:
                message = f"{unit.place}: {sample.key}: the shard is damaged here ({damage}); download or pack it again"
                yield Record(sample.key, None, f"{unit.place}: {sample.key}", self.stamp(unit), problem=message)
            message = f"{unit.place}: cannot be read further ({damage}); download or pack it again"
            yield Record(os.path.basename(unit.place), None, unit.place, self.stamp(unit), problem=message)
            return
        if sample is not None and not self._is_meta(sample):
            yield self._record(unit.place, sample)

    def positions(self, unit: Unit) -> Iterator[tuple[int, int, Record]]:
        """The start and end of each record in the shard in bytes, for `at`. Its image is not read and is a single byte
        here.

        Data after a damaged place is left out; a record has that as its problem. Raises CollectionError as `records`
        does, and for a compressed shard.
        """
        if tarball.is_packed(unit.place):
            raise CollectionError(f"{unit.place}: is compressed, so its middle cannot be read; decompress it (gunzip)")
        sample, start, stop = _Sample(""), 0, 0
        seen: set[str] = set()
        try:
            for member in tarball.names(unit.place, 0):
                if META.match(member.name) or not (parts := KEY.match(member.name)):
                    continue
                if parts[1] != sample.key:
                    if sample.names and not self._is_meta(sample):
                        yield start, stop, self._record(unit.place, sample)
                    if parts[1] in seen:
                        raise self._fragmented(unit.place, parts[1])
                    seen.add(parts[1])
                    sample, start = _Sample(parts[1]), member.start
                self._take(sample, member, parts[2].lower(), has_images=False)
                stop = member.stop
        except Damage as damage:
            for name in (f"{unit.place}: {sample.key}", unit.place):  # this sample and what follows
                message = f"{name}: cannot be read further ({damage}); download or pack it again"
                yield start, stop, Record(sample.key, None, name, self.stamp(unit), problem=message)
            return
        if sample.names and not self._is_meta(sample):
            yield start, stop, self._record(unit.place, sample)

    def at(self, path: str, content: bytes) -> Record:
        """The record at a position from `positions`; ``content``: the bytes there."""
        sample = _Sample("")
        try:
            for member in tarball.members_of(content):
                if not META.match(member.name) and (parts := KEY.match(member.name)):
                    sample.key = parts[1]
                    self._take(sample, member, parts[2].lower())
        except Damage as damage:
            sample.problems.append(f"the shard is damaged here ({damage}); download or pack it again")
        return self._record(path, sample)

    def description(self) -> Mapping[str, Any]:
        return {
            "source": "shards",
            "root": self._root,
            "image_column": self._image_field or "",
            "caption_column": self._text_field or "",
        }

    # ---- one sample ----

    def _take(self, sample: _Sample, member: Member, name: str, has_images: bool = True) -> None:
        """Read what a record needs of a member; others are skipped."""
        if name in sample.names:
            sample.problems.append(f"has two members {name!r}; pack the shard again without one of them")
        sample.names.append(name)
        is_image = self._is_image(name)
        if not is_image and name != JSON_FIELD and name not in self._texts():
            return
        if not member.is_file:
            sample.problems.append(f"{name!r} is a link; pack the shard again with --dereference --hard-dereference")
        elif member.size > (LARGEST_IMAGE if is_image else LARGEST_TEXT):
            sample.problems.append(f"{name!r} is too large ({member.size:,} bytes)")
        elif is_image:
            sample.images[name] = member.read() if has_images else b"\0"[: member.size]
        else:
            sample.texts[name] = member.read()

    def _record(self, shard: str, sample: _Sample) -> Record:
        problems, columns, text = sample.problems, {}, ""
        name = f"{shard}: {sample.key}"
        try:
            if JSON_FIELD in sample.texts:
                columns = parsed(sample.texts[JSON_FIELD].decode("utf-8-sig"))
                if not isinstance(columns, dict):
                    columns = {}
                    raise ValueError("is not an object")
        except ValueError as error:
            problems.append(f"{JSON_FIELD!r} {_text_error(error)}")
        try:
            text = self._text(sample, columns)
        except ValueError as error:
            problems.append(f"the text {_text_error(error)}")
        chosen, problem = self._chosen(sample)
        image = sample.images.get(chosen)
        if image is not None and not image:
            problem = f"{chosen!r} is empty"
        stamp = blake2b(image or b"", digest_size=16).hexdigest()
        reason = "; ".join(problems[:1] or [problem] * bool(problem))
        if reason:
            return Record(sample.key, None, name, stamp, text, columns, f"{name}: {reason}")
        return Record(sample.key, image, name, stamp, text, columns)

    def _chosen(self, sample: _Sample) -> tuple[str, str]:
        """The field of the image, and the problem if there is none."""
        found = [name for name in sample.names if self._is_image(name)]
        plain = [name for name in found if "." not in name]  # jpg, rather than mask.jpg
        some = plain or found
        if len(some) == 1:
            return some[0], ""
        if some:
            return "", (
                f"has several images ({', '.join(some)}); name the right one with {option('image_column')}, "
                "or pack the shard again if the dots are part of their names"
            )
        for name in sample.names:
            if needed := self._missing.get(_suffix(name)):
                return "", f"{name!r} is an image that needs {needed}"
        what = repr(self._image_field) if self._image_field else "image"
        return "", f"has no {what}, but {', '.join(sample.names)}"

    def _text(self, sample: _Sample, columns: Mapping[str, Any]) -> str:
        """The text on one line. Raises ValueError if it is not UTF-8."""
        for name in self._texts():
            if name in sample.texts:
                return " ".join(sample.texts[name].decode("utf-8-sig").split())
        from_json = columns.get(JSON_CAPTION)
        return " ".join(from_json.split()) if isinstance(from_json, str) and self._text_field is None else ""

    def _is_meta(self, sample: _Sample) -> bool:
        """Whether it is a member such as __meta__.json, which does not describe an image."""
        return bool(META.match(sample.key)) and not any(map(self._is_image, sample.names))

    def _is_image(self, name: str) -> bool:
        return name == self._image_field if self._image_field else _suffix(name) in self._readable

    def _texts(self) -> Sequence[str]:
        return TEXT_FIELDS if self._text_field is None else (self._text_field,)

    # ---- a shard ----

    def _members(self, path: str, most: int = 0) -> Iterator[tuple[Member, str, str]]:
        """Each member with its sample's key and its field. ``most``: only read that many names. Raises Damage."""
        for member in tarball.names(path, most) if most else tarball.members(path):
            if not META.match(member.name) and (parts := KEY.match(member.name)):
                yield member, parts[1], parts[2].lower()

    def _check_first(self) -> None:
        """Detects problems of all samples before a model is loaded."""
        path = self.paths[0]
        samples: dict[str, _Sample] = {}
        last = ""
        try:
            for _, key, name in self._members(path, HEAD_MEMBERS):
                if key in samples and key != last:
                    raise self._fragmented(path, key)
                samples.setdefault(key, _Sample(key)).names.append(name)
                last = key
        except Damage as damage:
            if not samples:
                raise CollectionError(f"{path}: cannot be read as a tar file ({damage}); check it") from None
        if samples := {key: sample for key, sample in samples.items() if not self._is_meta(sample)}:
            problems = [(key, self._chosen(sample)[1]) for key, sample in samples.items()]
            if all(problem for _, problem in problems):
                key, problem = problems[0]
                raise CollectionError(f"{path}: {key}: {problem}")
        elif len(self.paths) == 1:
            raise CollectionError(f"{path}: there are no images in this tar file")

    def _fragmented(self, path: str, key: str) -> CollectionError:
        return CollectionError(
            f"{path}: the members of {key!r} are not adjacent; pack it again in order of names "
            "(tar --sort=name)"
        )

    def _stamp(self, path: str) -> str:
        found = stamp_of(path)
        within = os.path.relpath(os.path.abspath(path), self._root)
        return "" if found is None else f"{within}:{found.size}-{found.mtime_ns}"


@dataclass(slots=True)
class _Sample:
    key: str
    names: list[str] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _check_file(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CollectionError(f"{path}: cannot be read ({reason}); shards have to be files on this machine") from None
    if not stat.S_ISREG(mode):
        raise CollectionError(f"{path}: is not a file; shards have to be files on this machine")


def _count_of_img2dataset(paths: Sequence[str]) -> int | None:
    total = 0
    for path in paths:
        try:
            stats = json.loads(Path(f"{os.path.splitext(path)[0]}_stats.json").read_bytes())
            total += int(stats["successes"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
    return total


def _suffix(name: str) -> str:
    return f".{name.rsplit('.', 1)[-1]}"


def _text_error(error: ValueError) -> str:
    return "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
