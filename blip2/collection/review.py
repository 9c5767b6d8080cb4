"""A page for reviewing captions: a file opened from disk, with a folder of thumbnails beside it.

Failed images come first, then those with the worst scores. The browser only draws what is on the screen, so that
thousands of images cost no more than a few.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from blip2.collection.columns import as_text
from blip2.collection.journal import Journal
from blip2.collection.questions import QUESTION
from blip2.collection.record import FAILED, SKIPPED, SUCCESS, Record, Result, Source
from blip2.collection.results import why_failed
from blip2.collection.review_page import PAGE
from blip2.disk import write_bytes, write_text
from blip2.errors import CollectionError, ImageError
from blip2.image import thumbnail

MAX_IMAGES = 20_000
THUMBNAIL_PX = 320
AT_A_TIME = 64
STATUSES = {SUCCESS: "done", FAILED: "failed", SKIPPED: "skipped"}


def write_review(path: Path, source: Source, journal: Journal) -> None:
    """Write the page of the results so far. An image that cannot be opened is shown by its name.

    Raises CollectionError if it cannot be written.
    """
    counts: Counter[str] = Counter()
    captions: Counter[int] = Counter()
    for result in _results(source, journal):
        counts[result.status] += 1
        captions[hash(result.line)] += 1
    worst = heapq.nsmallest(MAX_IMAGES, _results(source, journal), key=_worse)
    root = os.path.abspath(getattr(source, "root", "") or path / "none")
    is_within = Path(root) in Path(os.path.abspath(path)).parents
    # Hidden if it is in the folder of the images: thumbnails are not images of the collection.
    folder = path.with_name(f"{'.' if is_within else ''}{path.stem}.files")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = _thumbnails({result.key: result for result in worst}, source, folder)
        rows = [_row(result, drawn.get(result.key, ""), captions[hash(result.line)]) for result in worst]
        write_text(path, _page(path, rows, counts))
    except OSError as error:
        where = error.filename or path
        raise CollectionError(f"{where}: cannot be written ({error.strerror or error}); name another file") from None


def _results(source: Source, journal: Journal) -> Iterator[Result]:
    return (result for unit in source.units for result in journal.so_far(unit))


def _worse(result: Result) -> tuple[int, float, str]:
    if result.status == FAILED:
        return 0, 0.0, result.key
    return (1, result.scores[0], result.key) if result.scores else (2, 0.0, result.key)


def _row(result: Result, thumb: str, times: int) -> dict[str, Any]:
    lines = result.lines or [line for line in result.old.split("\n") if line]
    row = {
        "name": as_text(result.key),
        "text": as_text("".join(lines[:1])),
        "status": result.status,
        "thumb": thumb,
        "score": result.scores[0] if result.scores else None,
        "error": as_text(why_failed(result)),
        "question": as_text(str(result.columns.get(QUESTION, ""))),
        "others": [as_text(text) for text in lines[1:] or result.captions[1:]],
        "times": times if result.line and times > 1 else 0,
    }
    if result.path and os.path.isfile(result.path):
        with suppress(ValueError):
            row["file"] = Path(os.path.abspath(result.path)).as_uri()
    return {name: value for name, value in row.items() if value not in ("", None, [], 0) or name == "score"}


def _thumbnails(wanted: Mapping[str, Result], source: Source, folder: Path) -> dict[str, str]:
    """The path of each thumbnail, relative to the page. Thumbnails of an earlier page are reused."""
    found: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        for unit in source.units:
            records = (record for record in source.records(unit) if record.key in wanted)
            while some := list(islice(records, AT_A_TIME)):
                for record, name in zip(some, pool.map(lambda record: _thumbnail(record, folder), some), strict=True):
                    if name:
                        found[record.key] = f"{quote(folder.name)}/{name}"
            if len(found) == len(wanted):
                break
    return found


def _thumbnail(record: Record, folder: Path) -> str:
    """The file name; "" if there is no thumbnail."""
    identity = f"{record.key}\0{record.stamp}".encode("utf-8", "surrogatepass")
    name = f"{hashlib.blake2b(identity, digest_size=10).hexdigest()}.jpg"
    if not (folder / name).exists():
        if record.image is None or record.image == "-":
            return ""
        try:
            write_bytes(folder / name, thumbnail(record.image, THUMBNAIL_PX))
        except ImageError:
            return ""
    return name


def _page(path: Path, rows: list[dict[str, Any]], counts: Counter[str]) -> str:
    total = counts.total()
    parts = [f"{count:,} {STATUSES[status]}" for status, count in counts.most_common()]
    if total > len(rows):
        parts.append(f"the {len(rows):,} worst are shown")
    data = json.dumps(rows, ensure_ascii=True).replace("<", "\\u003c")
    title = as_text(path.stem)
    summary = f"{total:,} image{'' if total == 1 else 's'}: {', '.join(parts)}"
    return PAGE.replace("@TITLE@", escape(title)).replace("@SUMMARY@", escape(summary)).replace("@ROWS@", data)
