"""Parquet: all known values of each image, in one file or one per unit, with the images themselves if requested."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from blip2.collection.columns import Carried
from blip2.collection.needs import need
from blip2.collection.record import Record, Result, Source, Unit
from blip2.collection.sinks.lines import SAME_MEANING, Filtered, everything
from blip2.collection.sinks.places import Plain, check_file, paths_of, replacing
from blip2.collection.sinks.table import check_folder_table
from blip2.errors import CollectionError

GROUP_ROWS, BATCH_ROWS = 4096, 256
"""Rows per row group, and per conversion to columns, which takes little memory compared with rows."""
GROUP_BYTES = 64 * 2**20
"""Bytes of images in memory and in a row group; `datasets` wants at most 100 MB."""
DTYPES = {"int": "int64", "float": "float64", "bool": "bool", "str": "string", "json": "string"}
OWN = {
    "file_name": "str", "path_bytes": "str", "key": "str", "caption": "str", "captions": "list", "score": "float",
    "scores": "floats", "tokens": "int", "caption_original": "str", "sha256": "str", "width": "int", "height": "int",
    "status": "str", "error_message": "str",
}  # fmt: skip


class Parquet(Plain):
    """``images``: embed each image's bytes, as `datasets` does; images without a text are left out then."""

    wants = frozenset({"size", "sha256"})

    def __init__(
        self, path: Path, constants: Mapping[str, str], *, images: bool = False, may_replace: bool = False
    ) -> None:
        super().__init__()
        need("pyarrow.parquet", "parquet")
        self._path = path
        self._constants = constants
        self._images = images
        self._may_replace = may_replace
        self._source: Source | None = None
        self._is_folder_table = path.name == "metadata.parquet"  # the table of an ImageFolder

    def check(self, source: Source) -> None:
        check_file(self._path, may_replace=self._may_replace)
        self._source = source
        if self._is_folder_table:
            check_folder_table(self._path, paths_of(source) or ())

    def whole(self, results: Iterable[Result]) -> None:
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        images = None
        if self._is_folder_table:
            results = Filtered(results)
        if self._images:
            assert self._source is not None, "check comes first"
            images = images_of(self._source, self._source.units)
        write_parquet(
            self._path, results, lambda result: everything(self._constants, result, folder), self._constants, images
        )


def images_of(source: Source, units: Iterable[Unit]) -> Callable[[Result], bytes | None]:
    """A function from each result, in the order of the source, to the bytes of its image, read again one at a time."""
    records: Iterator[Record] = (record for unit in units for record in source.records(unit))

    def content(result: Result) -> bytes | None:
        record = next((record for record in records if record.key == result.key), None)
        if record is None:
            raise CollectionError(f"{result.name}: is no longer in the source; repeat the command")
        if isinstance(record.image, str):
            try:
                return Path(record.image).read_bytes()
            except OSError as error:
                raise CollectionError(f"{record.name}: can no longer be read ({error.strerror})") from None
        return record.image

    return content


def write_parquet(
    path: Path,
    results: Iterable[Result],
    own: Callable[[Result], dict[str, Any]],
    constants: Mapping[str, str],
    images: Callable[[Result], bytes | None] | None = None,
) -> None:
    """Write all results into one file, always the same bytes. Raises OSError."""
    arrow, parquet = need("pyarrow", "parquet"), need("pyarrow.parquet", "parquet")
    if images is not None:
        results = Filtered(results)
    own_kinds = {**OWN, **dict.fromkeys(constants, "str")}
    carried = Carried(results, [*own_kinds, "image"], SAME_MEANING)
    schema = _schema(arrow, {**own_kinds, **carried.kinds}, images=images is not None)
    with replacing(path) as unfinished, parquet.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        batches: list[Any] = []
        num_bytes = 0

        def write(*, is_group: bool) -> None:
            nonlocal num_bytes
            if rows:
                batches.append(arrow.RecordBatch.from_pylist(rows, schema))
                rows.clear()
            if is_group and batches:
                writer.write_table(arrow.Table.from_batches(batches))
                batches.clear()
                num_bytes = 0

        for result in results:
            row = {**own(result), **carried.of(result)}
            if images is not None:
                content = images(result)
                num_bytes += len(content or b"")
                row["image"] = {"bytes": content, "path": PurePath(str(row["file_name"])).name}
            rows.append(row)
            is_group = len(batches) * BATCH_ROWS + len(rows) == GROUP_ROWS or num_bytes >= GROUP_BYTES
            if is_group or len(rows) == BATCH_ROWS:
                write(is_group=is_group)
        write(is_group=True)


def _schema(arrow: Any, kinds: Mapping[str, str], *, images: bool) -> Any:
    types = {"list": arrow.list_(arrow.string()), "floats": arrow.list_(arrow.float64())}
    fields = [(name, types.get(kind) or arrow.type_for_alias(DTYPES[kind])) for name, kind in kinds.items()]
    if not images:
        return arrow.schema(fields)
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name, kind in kinds.items():
        value = {"dtype": DTYPES.get(kind, "string"), "_type": "Value"}
        features[name] = {"feature": value, "_type": "List"} if kind == "list" else value
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return arrow.schema([("image", image), *fields], metadata=metadata)
