"""Collections as other tools write them, for the tests of sources."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from blip2.collection.record import Record, Source


def jpeg(number: int, form: str = "JPEG") -> bytes:
    """A small image, another one for each number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number * 7 % 256, number * 31 % 256, number % 256)).save(file, form)
    return file.getvalue()


def pictures(folder: Path, names: Iterable[str]) -> list[Path]:
    found = [folder / name for name in names]
    for number, path in enumerate(found):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return found


def records(source: Source) -> list[Record]:
    """All of them, whose keys have to be unique."""
    found = [record for unit in source.units for record in source.records(unit)]
    assert len({record.key for record in found}) == len(found)
    return found


def told(source: Source) -> dict[str, str]:
    """The texts by key, "!" before what is wrong."""
    return {record.key: f"!{record.problem}" if record.problem else record.text for record in records(source)}


def tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """By Python's own tarfile, members in the order given."""
    with tarfile.open(path, mode) as file:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def sample(number, **fields):
    """The members of a sample, as webdataset has them."""
    key = f"{number:06}"
    return [(f"{key}.jpg", jpeg(number)), *((f"{key}.{name}", text.encode()) for name, text in fields.items())]


def shards(folder, sizes):
    """Shards of captions "dog N"."""
    folder.mkdir(exist_ok=True)
    for shard in range(len(sizes)):
        numbers = range(sum(sizes[:shard]), sum(sizes[: shard + 1]))
        members = [member for number in numbers for member in sample(number, txt=f"dog {number}")]
        tar(folder / f"{shard:05}.tar", dict(members))
    return folder
