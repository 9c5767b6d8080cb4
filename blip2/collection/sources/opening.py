"""From command-line arguments to a source, by the content of files, not only by their suffix."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import escape, glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from blip2.collection.record import Source
from blip2.collection.sources.annotations import CAPTIONS, FILE, refuse_split, rows_of
from blip2.collection.sources.fields import is_known_image
from blip2.collection.sources.files import Files, key_of
from blip2.collection.sources.imagefolder import NAMES, FolderMetadata, files_in, metadata_in
from blip2.collection.sources.parquet import Parquet
from blip2.collection.sources.rows import Rows
from blip2.collection.sources.shards import Shards
from blip2.collection.sources.tables import (
    HEAD_ROWS,
    Cells,
    JsonLines,
    JsonRows,
    Table,
    commonest_separator,
    parsed,
    read_json,
    reading,
    separator_of,
)
from blip2.collection.sources.tarball import MAGIC, PACKED, is_tar
from blip2.data.folders import Found, find_in
from blip2.errors import CollectionError, OptionError, option
from blip2.image import name_of, suffixes
from blip2.installed import install_line
from blip2.plaintext import ENCODINGS, read_lines

TAKEN = (
    "a folder, image files, webdataset shards (.tar), or rows in JSON, JSONL, CSV, TSV or parquet, each also as a "
    "quoted pattern"
)
FILES, SHARDS, ROWS, ANNOTATIONS = "images", "shards", "rows", "annotations"
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
TABLE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".pq")
HEAD_BYTES = 512
STATS = "_stats.json"
"""Suffixes of the files that img2dataset writes beside each shard."""


def open_source(
    arguments: Sequence[str],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
    images: str | None = None,
    caption_suffix: str = "",
    keeps_suffix: bool = False,
    exclude: Sequence[str] = (),
    recursive: bool = True,
    split: str | None = None,
    without: Sequence[str] = (),
) -> Source:
    """Open ``arguments``, all of one kind: folders, files, URLs, or patterns such as "shards/{000..099}.tar".

    ``image_column``, ``caption_column``: the columns of image and text in rows (in shards: the fields), detected by
    default. ``key_column``: the column that identifies a row, "row" for row numbers. ``images``: base folder of paths
    in rows. ``caption_suffix``: suffix of text files beside images (".txt"), which replaces the image's suffix or
    follows it (``keeps_suffix``). ``exclude``, ``recursive``: as in `find_in`. ``split``: of Karpathy files.
    ``without``: metadata files that are not read, since an earlier run wrote them.

    Raises CollectionError for what cannot be read; the message says what can.
    """
    places = list(dict.fromkeys(place for argument in arguments for place in places_of(argument)))
    if caption_suffix and not re.fullmatch(r"\.?[^./\\\0][^/\\\0]*", caption_suffix):
        raise OptionError(f"{option('caption_suffix')} is {caption_suffix!r}; give a suffix, such as .txt")
    if not places:
        raise CollectionError(f"there is nothing to read; name {TAKEN}")
    folders = [place for place in places if os.path.isdir(place)]
    walk: dict[str, Any] = {"recursive": recursive, "exclude": exclude}
    found = find_in(folders, **walk)
    if folders and not found.images and (others := _others(folders, walk)):
        places = [place for place in places if place not in folders] + others
        folders = []
    looked = _FileKinds(image_column, images, split)
    kinds: dict[str, str] = {}  # each with its first argument
    for place in places:
        kinds.setdefault(looked.kind(place), place)
    if len(kinds) > 1:
        names = " and ".join(f"{name_of(place)} ({kind})" for kind, place in kinds.items())
        raise CollectionError(f"{names} cannot be read together; name only one kind")
    [kind] = kinds
    if kind != ANNOTATIONS:
        refuse_split(split, places[0])
    if kind == SHARDS:
        return Shards(places, image_field=image_column, text_field=caption_column)
    if kind != FILES:
        tables = [looked.tables[place] for place in places]
        if kind == ANNOTATIONS:
            image_column, caption_column = FILE, caption_column or (CAPTIONS if CAPTIONS in tables[0].columns else None)
        return Rows(
            tables, image_column=image_column, caption_column=caption_column, key_column=key_column, images=images
        )
    everything = found if len(folders) == len(places) else find_in(places, **walk)
    suffix = f".{caption_suffix.removeprefix('.')}" if caption_suffix else ""
    return _files(everything, folders, _root(folders, places), suffix, keeps_suffix, caption_column, walk, without)


def _files(
    found: Found,
    folders: Sequence[str],
    root: str,
    text_suffix: str,
    keeps_suffix: bool,
    caption_column: str | None,
    walk: Mapping[str, Any],
    without: Sequence[str],
) -> Files:
    """Images with their metadata: of an ImageFolder, or of img2dataset."""
    if not found.images:
        raise CollectionError("; ".join(found.problems) or "there are no images")
    once: dict[str, str] = {}  # a list may name an image that is also in a folder
    for path in found.images:
        once.setdefault(key_of(path, root), path)
    images = list(once.values())
    has_metadata = any(found.others[os.path.splitext(name)[1]] for name in NAMES)
    left_out = {*map(os.path.abspath, without)}
    metadata = metadata_in(folders, **walk) if has_metadata else []
    metadata = [path for path in metadata if os.path.abspath(path) not in left_out]
    from_tables = FolderMetadata(metadata, images, caption_column)
    is_downloaded = any(map(_is_downloaded, folders))
    source = Files(
        images,
        root=root,
        text_suffix=text_suffix or (".txt" if is_downloaded else ""),
        keeps_suffix=keeps_suffix,
        has_json=is_downloaded,
        metadata=from_tables.by_path,
    )
    source.problems = [*found.problems, *from_tables.problems]
    source.found = found
    return source


def _is_downloaded(folder: str) -> bool:
    """Whether img2dataset wrote the folder: 00000_stats.json beside the folder 00000, with texts and JSON beside
    images."""
    found = glob(os.path.join(escape(folder), f"*{STATS}"))
    return any(os.path.isdir(path.removesuffix(STATS)) for path in found)


# ---- arguments ----


def places_of(argument: str) -> Iterator[str]:
    """The paths and URLs that an argument stands for."""
    if argument == "-" or re.match("data:", argument, re.IGNORECASE) or os.path.lexists(argument):
        yield argument
    elif re.match("https?://", argument, re.IGNORECASE):
        if re.search(r"\.(tar|tgz|parquet|jsonl?|csv|tsv|gz)$", re.split("[?#]", argument)[0], re.IGNORECASE):
            raise CollectionError(f"{argument}: only images can be read from URLs; download it first")
        yield argument
    elif scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+(?=:)", argument):
        raise CollectionError(
            f"{name_of(argument)}: {scheme[0]}: is not supported, and no command is run; name files on this machine"
        )
    elif re.search(r"\{.*(,|\.\.).*\}", argument):
        yield from _braces(argument)
    elif has_magic(argument):
        yield from _fitting(argument)
    elif argument.lower().endswith((*TAR_SUFFIXES, *TABLE_SUFFIXES)) or not argument:
        raise CollectionError(f"{name_of(argument)}: no such file; check the path (in {os.getcwd()})")
    else:
        yield argument  # a missing image is a problem of one record


def _braces(pattern: str) -> Iterator[str]:
    """Expand braces as webdataset and shells do. Raises CollectionError for missing files."""
    try:
        import braceexpand
    except ImportError:
        raise CollectionError(f"{pattern}: braces need a package: {install_line('data')}") from None
    try:
        expanded = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise CollectionError(f"{pattern}: these braces cannot be expanded ({error})") from None
    absent = [path for path in expanded if not has_magic(path) and not os.path.lexists(path)]
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise CollectionError(
            f"{pattern}: {absent[0]}{more} of {len(expanded):,} files are missing; check the numbers"
        )
    for path in expanded:
        yield from _fitting(path) if has_magic(path) and not os.path.lexists(path) else [path]


def _fitting(pattern: str) -> list[str]:
    """The files that match a pattern, in order. Files that are neither images nor shards are left out, as in a
    folder."""
    found = sorted(glob(pattern, recursive=True))
    if not found:
        raise CollectionError(f"{pattern}: matches no file; check it (in {os.getcwd()})")
    files, folders = [path for path in found if not os.path.isdir(path)], [*filter(os.path.isdir, found)]
    readable, _ = suffixes()
    if images := [path for path in files if os.path.splitext(path)[1].lower() in readable]:
        return sorted(images + folders)
    return _shards_or_parquet(files) or found


def _others(folders: Sequence[str], walk: Mapping[str, Any]) -> list[str]:
    """The shards of folders without images, or else their parquet files, as `datasets` and img2dataset write them."""
    return _shards_or_parquet(list(files_in(folders, **walk)))


def _shards_or_parquet(names: Sequence[str]) -> list[str]:
    for endings in (TAR_SUFFIXES, (".parquet",)):
        if some := [name for name in names if name.lower().endswith(endings)]:
            return some
    return []


def _root(folders: Sequence[str], places: Sequence[str]) -> str:
    """What keys are relative to: the folder, or the common parent folder; "" for a list of files."""
    if not folders:
        return ""
    if len(places) == 1:
        return folders[0]
    files = [os.path.dirname(os.path.abspath(place)) for place in places if place not in folders]
    try:
        return os.path.commonpath([*map(os.path.abspath, folders), *files])
    except ValueError:  # on several drives of Windows
        return ""


# ---- contents of files ----


class _FileKinds:
    """``tables``: the opened files of rows."""

    def __init__(self, image_column: str | None, images: str | None, split: str | None) -> None:
        self.tables: dict[str, Table] = {}
        self._image_column = image_column
        self._images = images
        self._split = split
        self._readable, self._missing = suffixes()

    def kind(self, place: str) -> str:
        """The kind of a file. Raises CollectionError for an unknown kind, or if it cannot be read."""
        suffix = os.path.splitext(place)[1].lower()
        if place == "-" or os.path.isdir(place) or suffix in self._readable or suffix in self._missing:
            return FILES
        if not os.path.isfile(place):
            if place.lower().endswith((*TAR_SUFFIXES, *TABLE_SUFFIXES)):
                raise CollectionError(f"{name_of(place)}: is not a regular file; save its output to a file first")
            return FILES
        if not (head := _head(place)):
            raise CollectionError(f"{name_of(place)}: is empty; check it")
        if head.startswith(b"PAR1"):
            self.tables[place] = self._parquet(place)
            return ROWS
        if head[MAGIC] == b"ustar" or place.lower().endswith(TAR_SUFFIXES):
            return SHARDS
        if head.startswith(tuple(PACKED)):
            if is_tar(place):
                return SHARDS
            raise CollectionError(f"{place}: is compressed, but not a tar file; decompress it first")
        if _text(head).lstrip().startswith(("{", "[")):
            return self._json(place)
        separator = separator_of(place, lambda name: name == self._image_column or is_known_image(name))
        if separator is None and suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else commonest_separator(place)
        if separator is not None:
            self.tables[place] = Cells(place, separator)
            return ROWS
        if suffix in TABLE_SUFFIXES:
            raise CollectionError(f"{place}: is not a {suffix.lstrip('.')} file; name {TAKEN}")
        return FILES  # any other content is reported for its record

    def _parquet(self, place: str) -> Table:
        table = Parquet(place)
        shard = os.path.splitext(place)[0] + ".tar"
        if not table.holding_bytes and self._image_column is None and os.path.exists(shard):
            raise CollectionError(f"{place}: only describes the images in {shard}; name that file")
        return table

    def _json(self, place: str) -> str:
        value, is_whole = _json_value(place)
        if isinstance(value, list):
            self.tables[place] = JsonRows(place, value)
        elif (rows := rows_of(value, place, self._images, self._split)) is not None:
            self.tables[place] = JsonRows(place, rows)
            return ANNOTATIONS
        elif is_whole:
            raise CollectionError(f"{place}: is JSON of an unknown tool; name {TAKEN}")
        else:
            self.tables[place] = JsonLines(place)
        return ROWS


def _json_value(place: str) -> tuple[object, bool]:
    """The file's JSON value, and whether the file is a single value over several lines. Raises CollectionError."""
    with reading(place):
        lines = list(islice((line for line in read_lines(Path(place)) if line.strip()), HEAD_ROWS))
    rows = list(map(_parsed, lines))
    if isinstance(rows[0], dict):
        return (rows[0] if len(rows) == 1 else None), False
    try:
        return read_json(place), True
    except CollectionError:
        if lines[0].lstrip().startswith("[") or not any(isinstance(row, dict) for row in rows):
            raise
    return None, False  # rows with a broken first row


def _parsed(line: str) -> object:
    try:
        return parsed(line)
    except ValueError:
        return None


def _head(place: str) -> bytes:
    with reading(name_of(place)), open(place, "rb") as file:
        return file.read(HEAD_BYTES)


def _text(head: bytes) -> str:
    encoding = next((name for mark, name in ENCODINGS if head.startswith(mark)), "utf-8")
    return head.decode(encoding, errors="ignore")
