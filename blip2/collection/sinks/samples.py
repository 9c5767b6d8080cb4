"""Samples of a webdataset tar: read member by member, and written so that the same content gives the same bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from blip2.errors import CollectionError
from blip2.image import suffixes

EMPTY_MEMBERS = {"json": b"{}", "txt": b"", "text": b"", "caption": b""}
"""Content of a member that this sample lacks and others have. There is none for arrays and the like."""


class Sample(NamedTuple):
    """``members``: the bytes of each field, by its name without the key."""

    key: str
    members: dict[str, bytes]


def split_name(name: str) -> tuple[str, str]:
    """A member's key and field, split as in webdataset, datasets and Ray: at the first dot of the file name."""
    folder, slash, last = name.rpartition("/")
    stem, _, field = last.partition(".")
    return folder + slash + stem, field


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a shard, in order. Raises CollectionError if it is no complete tar, OSError."""
    with _opened(path) as shard:
        key, members = "", dict[str, bytes]()
        for member, found, field in _members(shard):
            if found != key and members:
                yield Sample(key, members)
                members = {}
            key = found
            content = shard.extractfile(member)
            members[field] = content.read() if content is not None else b""
        if members:
            yield Sample(key, members)


def fields_of(path: Path) -> tuple[set[str], set[str]]:
    """The fields that any sample of a shard has, and those that all have, up to the first damage. Reads no content."""
    by_key: dict[str, set[str]] = {}
    with suppress(CollectionError), _opened(path) as shard:
        for _, key, field in _members(shard):
            by_key.setdefault(key, set()).add(field)
    found = [*by_key.values()]
    return set().union(*found), set.intersection(*found) if found else set()


def image_field(fields: Mapping[str, object] | set[str]) -> str:
    """The field that holds the image of a sample; "" if there is none."""
    readable, others = suffixes()
    known = {*readable, *others}
    return next((field for field in sorted(fields, key=_dots) if f".{field.rpartition('.')[2].lower()}" in known), "")


def _dots(field: str) -> tuple[int, str]:
    return field.count("."), field


def write_samples(path: Path, found: Iterable[Sample]) -> None:
    """Write samples: sorted names, no times, no owners; long and non-ASCII names (PAX). Raises OSError."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for sample in found:
            for field in sorted(sample.members):
                member = tarfile.TarInfo(f"{sample.key}.{field}")
                member.size = len(sample.members[field])
                member.mode = 0o444
                shard.addfile(member, io.BytesIO(sample.members[field]))
            shard.members.clear()  # type: ignore[attr-defined]  # it would keep all for a list of them


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as shard:
            yield shard
    except tarfile.TarError as error:
        raise CollectionError(f"{path}: is damaged or not a tar file ({error}); download or pack it again") from None


def _members(shard: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    for member in shard:
        key, field = split_name(member.name)
        is_hidden = not key or key.endswith("/") or not field
        is_meta = member.name.startswith("__") and member.name.partition("/")[0].endswith("__")
        if member.isfile() and not is_hidden and not is_meta:
            yield member, key, field.lower()
    # The standard library takes a truncated header for the end of the file.
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    rest = shard.fileobj.read(tarfile.BLOCKSIZE)
    if len(rest) not in (0, tarfile.BLOCKSIZE) or any(rest):
        raise tarfile.ReadError("it is truncated")
