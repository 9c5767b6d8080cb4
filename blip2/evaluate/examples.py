"""Rows with references, and a model's outputs by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.errors import CollectionError, option
from blip2.plaintext import NotTextError, read_lines

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Example:
    """A row. ``wanted``: reference captions (``question`` is then None) or answers: one, or those of several people
    (``are_people``); empty if unknown or not scored. ``kind``: the type of the question, "" if there is none. ``id``:
    the id in the data set. ``rephrased``: the question in other words."""

    image: str
    question: str | None
    wanted: tuple[str, ...]
    are_people: bool
    kind: str
    id: str | int | None = None
    rephrased: tuple[str, ...] = ()


def read(rows: Path) -> list[Example]:
    examples: list[Example] = []
    try:
        for number, line in enumerate(read_lines(rows), start=1):
            if line.strip():
                examples.append(_example(line, f"{rows}:{number}"))
    except OSError as error:
        raise CollectionError(f"{rows}: cannot be read ({error.strerror}); name a file of rows") from None
    except NotTextError as error:
        raise CollectionError(f"{rows}: {error}; name a file of rows") from None
    if not examples:
        raise CollectionError(f"{rows}: has no rows; write one JSON object a line")
    if len({example.question is None for example in examples}) > 1:
        raise CollectionError(f"{rows}: has both captions and questions; split it into two files")
    return examples


def _example(line: str, place: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise CollectionError(f"{place}: is not JSON; write one JSON object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise CollectionError(f'{place}: has no "image"; name an image in each row')
    question, kind, own_id = row.get("question"), row.get("type", ""), row.get("id")
    rephrased = row.get("rephrased", [])
    if not isinstance(rephrased, list) or not all(isinstance(text, str) and text.strip() for text in rephrased):
        raise CollectionError(f'{place}: "rephrased" has to be a list of questions')
    if row.get("unscored") is True and isinstance(question, str):
        return Example(row["image"], question, (), False, str(kind), own_id, tuple(rephrased))
    name = next((each for each in ("answers", "answer", "captions", "caption") if each in row), None)
    wanted = row.get(name) if name is not None else None
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(wanted, dict) and all(isinstance(count, int) and 0 < count < 1000 for count in wanted.values()):
        wanted = [text for text, count in wanted.items() for _ in range(count)]
    if not isinstance(wanted, list) or not wanted or not all(isinstance(text, str) for text in wanted):
        raise CollectionError(f'{place}: has no references; give "answer", "answers" or "captions", as texts')
    if name not in ("answers", "answer"):
        question = None
    elif not isinstance(question, str):
        raise CollectionError(f'{place}: has answers, but no "question"')
    are_people = name == "answers" and len(wanted) > 1
    return Example(row["image"], question, tuple(wanted), are_people, str(kind), own_id, tuple(rephrased))


def outputs(folder: Path, number: int) -> list[str | None]:
    """The outputs by row; None for an unreadable image. Raises CollectionError."""
    return texts_of(answers(folder, number))


def texts_of(rows: Sequence[dict[str, Any] | None]) -> list[str | None]:
    """The texts of `answers`."""
    return [row["caption"] if row is not None else None for row in rows]


def answers(folder: Path, number: int) -> list[dict[str, Any] | None]:
    """The complete result of each row; None for an unreadable image. Raises CollectionError."""
    path = folder / ANSWERS
    found: dict[int, dict[str, Any] | None] = {}
    try:
        for row in _rows(path):
            found[int(row["key"])] = row if row["status"] == "success" and isinstance(row["caption"], str) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CollectionError(f"{path}: cannot be read ({error}); evaluate with {option('restart')}") from None
    if missing := number - len(found):
        raise CollectionError(f"{path}: has no answer to {missing} of {number} rows; run the same command again to "
            "resume")
    return [found[row] for row in range(number)]


def _rows(path: Path) -> Iterator[Any]:
    return map(json.loads, read_lines(path))
