"""One parquet file per unit, written as soon as the unit is finished: 00000.parquet, 00001.parquet, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blip2.collection.needs import need
from blip2.collection.record import Result, Source, Unit
from blip2.collection.sinks.lines import everything
from blip2.collection.sinks.parquet import images_of, write_parquet
from blip2.collection.sinks.places import Plain, check_folder
from blip2.errors import CollectionError


class ParquetParts(Plain):
    """``images``: embed each image's bytes, see `Parquet`."""

    wants = frozenset({"size", "sha256"})

    def __init__(self, folder: Path, constants: Mapping[str, str], *, images: bool = False) -> None:
        super().__init__()
        need("pyarrow.parquet", "parquet")
        self._folder = folder
        self._constants = constants
        self._images = images
        self._source: Source | None = None

    def check(self, source: Source) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise CollectionError(f"{self._folder}: is a file; one parquet per unit needs a folder")
        check_folder(self._folder)
        self._source = source
        for unit in source.units:
            target = self._path(unit)
            if Path(unit.place).is_file() and target.exists() and target.samefile(unit.place):
                raise CollectionError(f"{unit.place}: is the source itself; give another folder with -o")

    def unit(self, unit: object, results: Sequence[Result]) -> None:
        assert isinstance(unit, Unit) and self._source is not None, "check comes first"
        self._folder.mkdir(parents=True, exist_ok=True)
        images = images_of(self._source, [unit]) if self._images else None
        write_parquet(
            self._path(unit), results, lambda result: everything(self._constants, result, self._folder),
            self._constants, images,
        )  # fmt: skip

    def _path(self, unit: Unit) -> Path:
        return self._folder / f"{unit.number:05}.parquet"
