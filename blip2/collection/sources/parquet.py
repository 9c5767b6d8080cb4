"""Parquet, read a few rows at a time: never a whole file, and images only if their rows are requested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from blip2.collection.sources.tables import Row, Table
from blip2.disk import stamp_of
from blip2.errors import CollectionError
from blip2.installed import install_line

BATCH_ROWS = 16
LOOKED_ROWS = 4096
OPENED = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}
"""Size of pyarrow's read buffer in bytes: without one it reads each row group as a whole. Few files have checksums."""


class Parquet(Table):
    """``schema``: the types of its columns, a pyarrow.Schema. Raises CollectionError if it is not parquet."""

    def __init__(self, path: str) -> None:
        self.path = path
        with _opened(path) as file:
            self.schema = file.schema_arrow
            self.num_rows = file.metadata.num_rows
            empty = _empty_columns(file.metadata)
            self._group_rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        self.columns = list(self.schema.names)
        self.holding_bytes = [field.name for field in self.schema if _holds_bytes(field.type, field.name, empty)]
        found = stamp_of(path)
        self.stamp = "" if found is None else f"{found.size}-{found.mtime_ns}"

    def rows(self, start: int = 0) -> Iterator[Row]:
        group, before = 0, 0  # the row group of the first row, and the rows before it
        while group < len(self._group_rows) and before + self._group_rows[group] <= start:
            before += self._group_rows[group]
            group += 1
        yield from self._batches(None, BATCH_ROWS, group, before, start)

    def looked(self, columns: Sequence[str]) -> Iterator[Row]:
        wanted = []
        for name in dict.fromkeys(columns):
            if name not in self.holding_bytes:
                wanted.append(name)
            elif _has_field(self.schema.field(name).type, "path"):
                wanted.append(f"{name}.path")
        if wanted:
            yield from self._batches(wanted, LOOKED_ROWS, 0, 0, 0)
        else:
            yield from (Row(self._name(number), {}) for number in range(self.num_rows))

    def _batches(
        self, columns: list[str] | None, batch_rows: int, group: int, before: int, start: int
    ) -> Iterator[Row]:
        with _opened(self.path) as file:
            groups = range(group, len(self._group_rows))
            number = before
            for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False):
                skipped = min(max(start - number, 0), batch.num_rows)
                for offset, values in enumerate(batch.slice(skipped).to_pylist(), start=number + skipped):
                    yield Row(self._name(offset), values)
                number += batch.num_rows

    def _name(self, number: int) -> str:
        return f"{self.path} [{number}]"


def _holds_bytes(kind: Any, name: str, empty: set[str]) -> bool:
    """Whether a column holds images as `datasets` writes them (struct<bytes, path>), or plain bytes. Where `datasets`
    only wrote paths, there are no bytes."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return _has_field(kind, "bytes") and f"{name}.bytes" not in empty
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _empty_columns(metadata: Any) -> set[str]:
    """The columns, also nested ones, that are empty in every row."""
    counts: dict[str, int] = {}
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        for column in (group.column(number) for number in range(group.num_columns)):
            statistics = column.statistics
            is_empty = statistics is not None and statistics.has_null_count and statistics.null_count == group.num_rows
            counts[column.path_in_schema] = counts.get(column.path_in_schema, 0) + (not is_empty)
    return {name for name, count in counts.items() if not count}


def _has_field(kind: Any, name: str) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The pyarrow.parquet.ParquetFile. Errors within are CollectionErrors that name the file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise CollectionError(f"{path}: parquet needs a package: {install_line('data')}") from None
    try:
        with pyarrow.parquet.ParquetFile(path, **OPENED) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise CollectionError(f"{path}: cannot be read ({reason[:200]}); check or replace it") from None
