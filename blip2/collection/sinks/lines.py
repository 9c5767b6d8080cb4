"""Formats with one line per image: JSON, CSV and TSV, each as its tool reads it."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from blip2.collection.columns import Carried, as_text
from blip2.collection.record import SUCCESS, Result
from blip2.collection.sinks.places import absolute, is_text, relative
from blip2.collection.sinks.table import Format, check_image
from blip2.errors import CollectionError

NOT_GIVEN = {
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
"""Texts that pandas reads from a CSV as missing, quoted or not, without keep_default_na=False."""


def named(results: Iterable[Result]) -> Iterator[Result]:
    """The results that have a text. On the others, trainers would stop or learn empty captions."""
    return (result for result in results if result.line)


SAME_MEANING = (
    "key", "caption", "captions", "caption_original", "status", "width", "height", "sha256", "error_message",
)  # fmt: skip
"""Columns of a source that `everything` writes again: those of img2dataset, and of an earlier run."""


def rows(
    results: Iterable[Result], own: Callable[[Result], dict[str, Any]], same: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """Each result's own row with its source columns; the same keys for all."""
    carried: Carried | None = None
    for result in results:
        row = own(result)
        if carried is None:
            carried = Carried(results, row, same)
        yield {**row, **carried.of(result)}


def json_lines(file: IO[str], found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for row in found:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return iter(())


class Filtered:
    """Results without some of them; can be iterated repeatedly."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = results

    def __iter__(self) -> Iterator[Result]:
        return named(self._results)


def below(result: Result, folder: Path) -> str:
    """An image's path relative to the folder of the table. Raises CollectionError if it has none."""
    if not result.path:
        raise CollectionError(
            f"{result.name}: has no file of its own, which this format needs; give --format jsonl or parquet"
        )
    check_image(result.path, folder / "metadata.jsonl", is_below=True)
    return relative(result.path, folder)


def whole_path(result: Result) -> str:
    """An image's absolute path. Raises CollectionError if it has none."""
    if not result.path:
        raise CollectionError(
            f"{result.name}: has no file of its own, which this format needs; give --format jsonl or parquet"
        )
    return absolute(result.path)


# ---- datasets: ImageFolder ----


def _image_folder(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    return json_lines(
        file, rows(Filtered(results), lambda result: {"file_name": below(result, folder), "text": result.line})
    )


# ---- all values ----


def everything(constants: Mapping[str, str], result: Result, folder: Path) -> dict[str, Any]:
    """The row for JSON lines and parquet. ``file_name`` is relative to the folder of the table if possible, else
    absolute."""
    name = relative(result.path, folder) or (absolute(result.path) if result.path else result.key)
    return {
        "file_name": as_text(name),
        "path_bytes": path_bytes(name),
        "key": as_text(result.key),
        "caption": result.line,
        "captions": [*(result.lines if result.status == SUCCESS else [])],
        "score": float(result.scores[0]) if result.scores else None,
        "scores": [*map(float, result.scores)],
        "tokens": int(result.tokens[0]) if result.tokens else 0,
        "caption_original": as_text(result.old),
        **constants,
        "sha256": result.sha256,
        "width": result.width,
        "height": result.height,
        "status": result.status,
        "error_message": as_text(result.error_message),
    }


def path_bytes(name: str) -> str:
    """The bytes of a name that is not valid Unicode, in base64, since text cannot hold them; else ""."""
    if is_text(name):
        return ""
    with suppress(UnicodeEncodeError):
        return base64.b64encode(name.encode("utf-8", "surrogateescape")).decode("ascii")
    return ""


def _json(constants: Mapping[str, str], file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    return json_lines(file, rows(results, lambda result: everything(constants, result, folder), SAME_MEANING))


def json_format(constants: Mapping[str, str]) -> Format:
    return Format(partial(_json, constants), paths="", wants=frozenset({"size", "sha256"}))


# ---- rows for trainers ----


def _train(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    def row(result: Result) -> dict[str, Any]:
        captions = {"captions": result.lines} if len(result.lines) > 1 else {"caption": result.line}
        number = {name: value for name, value in result.columns.items() if name == "image_id"}
        return {"image": relative(result.path, folder) or whole_path(result), **captions, **number}

    return json_lines(file, map(row, named(results)))


def _invoke(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    return json_lines(
        file,
        (
            {"image": relative(result.path, folder) or whole_path(result), "text": result.line}
            for result in named(results)
        ),
    )


def _sd_scripts(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    return json_lines(
        file,
        (
            {"image_path": whole_path(result), "caption": result.line, **size_and_tags(result)}
            for result in named(results)
        ),
    )


def _musubi(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    return json_lines(file, ({"image_path": whole_path(result), "caption": result.line} for result in named(results)))


def size_and_tags(result: Result) -> dict[str, Any]:
    """The known values that kohya's metadata has beside the caption."""
    found: dict[str, Any] = {}
    if result.width and result.height:
        found["image_size"] = [result.width, result.height]
    if isinstance(tags := result.columns.get("tags"), str) and tags:
        found["tags"] = tags
    return found


# ---- CSV and TSV ----


def csv_format(image_column: str, caption_column: str, *, marks: bool = False) -> Format:
    """``marks``: start with a byte order mark, without which Excel does not read UTF-8."""
    names = (image_column, caption_column)
    return Format(partial(_csv, names), paths="named", encoding="utf-8-sig" if marks else "utf-8")


def _csv(names: tuple[str, str], file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    def row(result: Result) -> tuple[str, str]:
        path = relative(result.path, folder) or (absolute(result.path) if result.path else result.key)
        return as_text(path), result.line

    return write_csv(file, Filtered(results), row, ",", names)


def _open_clip(file: IO[str], results: Iterable[Result], folder: Path) -> Iterable[str]:
    def row(result: Result) -> tuple[str, str]:
        return whole_path(result), result.line

    return write_csv(file, Filtered(results), row, "\t", ("filepath", "title"), carries=False)


def write_csv(
    file: IO[str],
    results: Iterable[Result],
    row: Callable[[Result], tuple[str, str]],
    separator: str,
    names: tuple[str, str],
    *,
    carries: bool = True,
) -> Iterable[str]:
    carried = Carried(results if carries else (), names)
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    writer.writerow([*names, *carried.kinds])
    num_lost = 0
    for result in results:
        path, text = row(result)
        num_lost += text in NOT_GIVEN
        writer.writerow([path, text, *carried.of(result).values()])
    if num_lost:
        yield (
            f"pandas and datasets read captions such as None or NA ({num_lost} here) as missing, without "
            "keep_default_na=False; JSON lines and parquet keep them"
        )


FORMATS = {
    "imagefolder": Format(_image_folder, paths="below"),
    "train": Format(_train),
    "invoke": Format(_invoke),
    "sd-scripts": Format(_sd_scripts, wants=frozenset({"size"})),
    "musubi": Format(_musubi),
    "open-clip": Format(_open_clip),
}
