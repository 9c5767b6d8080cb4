"""Makes the rows of a benchmark from its files: rows of the same image side by side, in one file.

A row has ``image``, ``id`` and ``type``; ``captions``, or ``question`` with ``answer`` or ``answers`` ("unscored" marks
rows without references or that are not scored), and optionally ``choices``.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.data.cleaning import clean_question
from blip2.data.convert import Conversion
from blip2.data.kinds import Kind
from blip2.errors import CollectionError, RecipeError, option
from blip2.evaluate.benchmark import ASK, CHOOSE, PAIR, Benchmark
from blip2.evaluate.files import UNPACKED, Opened, find, has_column
from blip2.tasks.defaults import BATCH_SIZE
from blip2.text import clean

ROWS, PREPARED = "rows.jsonl", "benchmark.json"
VERSION = 1
"""Version of the rows; to be raised when the same files give different rows."""


@dataclass(frozen=True)
class Prepared:
    """``rows``: the file. ``notes``: what is missing from the benchmark, one line each."""

    rows: Path
    notes: tuple[str, ...]


def prepare(name: str, benchmark: Benchmark, data: Path, folder: Path, first: int | None) -> Prepared:
    """Make the rows, unless they exist for the same files. ``first``: only this many rows.

    Raises CollectionError for files that are missing or of another kind, and for the folder of another benchmark;
    RecipeError for errors inside a file.
    """
    layout, files = find(benchmark, data)
    data = data.absolute()  # the rows are in another folder
    stamps = [[str(path), stamp.size, stamp.mtime_ns] for path in files if (stamp := disk.stamp_of(path)) is not None]
    made = {"version": VERSION, "benchmark": name, "first": first, "files": stamps}
    rows, record = folder / ROWS, folder / PREPARED
    before = made_before(record, name)
    if before.get("made") == made and rows.exists():
        return Prepared(rows, tuple(before["notes"]))
    read = Opened(data / UNPACKED / name.removesuffix("-retrieval").removesuffix("-choices"))
    notes: list[str] = []
    if benchmark.task == PAIR:
        found = _pairs(files, read, data)
    else:
        conversion = Conversion(
            layout.kind, files, images=None if read.holds(files) else data,
            split=layout.split if layout.split and has_column(files[0], layout.kind.split) else None,
            keep={"id": (), **benchmark.keep}, read=read, near=files[0].parent,
        )  # fmt: skip
        found = _of_conversion(conversion, benchmark, notes)
    try:
        written = list(islice(found, first))
    except RecipeError as error:
        if benchmark.task == PAIR or conversion.counts.rows or not any(map(_is_absence, conversion.counts.left_out)):
            raise
        wanted = "; ".join(map(str, benchmark.origins[1:]))
        raise CollectionError(f"{data}: has none of the images. Get {wanted} ({error})") from None
    if len(written) != benchmark.rows:
        notes.insert(0, f"{len(written):,} of its {benchmark.rows:,} rows")
    if benchmark.has_domains and not any(row["type"] for row in written):
        notes.append("these files do not have the domains")
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in packed(written)).encode("utf-8")
    if not rows.exists() or rows.read_bytes() != text:  # another shard of this evaluation may have them open
        disk.write_bytes(rows, text)
    disk.write_text(record, json.dumps({"made": made, "notes": notes}, indent=1, ensure_ascii=False) + "\n")
    return Prepared(rows, tuple(notes))


def made_before(record: Path, name: str) -> dict[str, Any]:
    """The record of existing rows. Raises CollectionError for those of another benchmark."""
    try:
        before = json.loads(record.read_text("utf-8"))
        other = before["made"]["benchmark"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CollectionError(f"{record}: cannot be read ({error}); name another folder") from None
    if other != name:
        raise CollectionError(f"{record.parent}: has an evaluation of {other}; name another folder for {name}")
    return dict(before)


def _is_absence(reason: str) -> bool:
    return "image does not exist" in reason


# ---- rows ----


def _of_conversion(conversion: Conversion, benchmark: Benchmark, notes: list[str]) -> Iterator[dict[str, Any]]:
    for row in conversion.rows():
        kept = row.pop("kept")[0]
        made = {"image": row["image"], "id": _id(kept.get("id"), row["image"]), "type": _type(kept.get("type"))}
        if benchmark.task in (ASK, CHOOSE):
            yield made | {"question": clean_question(row["question"])} | _right(row, kept, benchmark, conversion.kind)
        else:
            yield made | {"captions": row["captions"]}
    for reason, (count, place) in conversion.counts.left_out.items():
        if reason != "it belongs to another split":
            notes.append(f"{count:,} left out: {reason}; the first is {place}")


def _right(row: Mapping[str, Any], kept: Mapping[str, Any], benchmark: Benchmark, kind: Kind) -> dict[str, Any]:
    """The reference answers."""
    if benchmark.task == CHOOSE:
        choices, right = kept.get("choices"), kept.get("right")
        texts = [clean(str(choice)) for choice in choices] if isinstance(choices, list) else []
        different = [*dict.fromkeys(texts)]
        if not isinstance(right, int) or not 0 <= right < len(texts) or len(different) < 2 or "" in different:
            name = kept.get("id")
            raise CollectionError(f"question {name}: has no choices with the right one; download the file again")
        return {"choices": different, "answer": texts[right]}
    if not kind.answer:
        return {"unscored": True}
    given = row["given"]
    if len(given) == 1 and given[0].startswith("["):  # a list, written as text
        with suppress(ValueError, SyntaxError, TypeError):
            given = [str(text) for text in ast.literal_eval(given[0])]
    if kept.get("is_difficult") is True:
        return {"answers": given, "unscored": True}
    return {"answer": given[0]} if len(given) == 1 else {"answers": given}


def _id(value: object, image: str) -> str | int:
    """The id in the data set, or the number at the end of the image's name."""
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return int(value) if isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,17}|0", value) else value
    digits = re.search(r"(\d+)$", Path(image).stem)
    return int(digits[1]) if digits else Path(image).stem


def _type(value: object) -> str:
    if isinstance(value, Mapping):  # for GQA
        return {"query": "open"}.get(str(value.get("structural")), "binary")
    return str(value or "")


def _pairs(files: Sequence[Path], read: Opened, data: Path) -> Iterator[dict[str, Any]]:
    """Winoground: two rows for each example, each with one image and both captions."""
    images = {path.stem: path for path in data.rglob("ex_*_img_*.*")} if not read.holds(files) else {}
    for file in files:
        for _, _, value, place in read(file):
            for side in (0, 1):
                try:
                    image = str(value[f"image_{side}"])
                    image = str(images[image]) if images else image
                    yield {
                        "image": image, "id": f"{value['id']}/{side}", "type": str(value.get("collapsed_tag") or ""),
                        "captions": [str(value["caption_0"]), str(value["caption_1"])],
                    }  # fmt: skip
                except (KeyError, TypeError, AttributeError) as error:
                    raise CollectionError(
                        f"{place}: {error} is missing, in the file or among the images; unpack images.zip into "
                        f"{option('data')}, or download the file again"
                    ) from None


def packed(rows: Iterable[dict[str, Any]], size: int = BATCH_SIZE) -> Iterator[dict[str, Any]]:
    """Order rows so that those of an image are adjacent and batches of ``size`` rows divide few images. A model with
    batches of this size, or two or four times as many, encodes each image once."""
    of_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        of_image[row["image"]].append(row)
    by_number: dict[int, deque[list[dict[str, Any]]]] = defaultdict(deque)
    for some in of_image.values():
        by_number[len(some)].append(some)
    left = size
    while by_number:
        there = {number: len(some) for number, some in by_number.items()}
        numbers = _filling(left, there) if max(there) <= size or left < size else None
        for number in numbers or [max(there)]:
            yield from by_number[number].popleft()
            if not by_number[number]:
                del by_number[number]
            left = (left - number) % size or size


def _filling(left: int, there: Mapping[int, int]) -> list[int] | None:
    """Numbers that add up to ``size``, large ones first, from those available with these counts; None if impossible."""
    if left == 0:
        return []
    for number in sorted(there, reverse=True):
        if number <= left and there[number]:
            fewer = {other: count - (other == number) for other, count in there.items() if other <= number}
            if (rest := _filling(left - number, fewer)) is not None:
                return [number, *rest]
    return None
