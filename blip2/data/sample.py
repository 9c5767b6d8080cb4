"""One row of training data: a picture, and everything that is said about it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from blip2.data.foreign import advice


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Row:
    """``image`` is where the picture lies. A dialogue is a list of turns of which later ones lean on earlier."""

    image: str
    captions: tuple[str, ...] = ()
    questions: tuple[Turn, ...] = ()
    dialogues: tuple[tuple[Turn, ...], ...] = ()


def parse_row(record: object) -> Row:
    """A decoded JSON object to a `Row`; keys that mean nothing here are passed over.

    ``image`` (text) is required; then any of ``caption`` or ``text`` (text), ``captions`` (list of texts),
    ``question`` with ``answer``, ``questions`` (list of objects with both), ``dialogues`` (list of lists of
    them). Raises ValueError that says what is wrong, and what a row of another tool would have to be.
    """
    try:
        return _parsed(record)
    except ValueError as error:
        raise ValueError(f"{error}; {advice(record)}") from None


def _parsed(record: object) -> Row:
    if not isinstance(record, dict):
        raise ValueError('it is not an object {"image": ...}')
    image = _text(record, "image")
    captions = [_text(record, key) for key in ("caption", "text") if key in record]
    captions += [_said(text, "captions") for text in _list(record, "captions")]
    questions = [_turn(turn, "questions") for turn in _list(record, "questions")]
    if "question" in record or "answer" in record:
        questions.append(_turn(record, "the row"))
    dialogues = []
    for dialogue in _list(record, "dialogues"):
        if not isinstance(dialogue, list) or not dialogue:
            raise ValueError("a dialogue has to be a list of turns, each with question and answer")
        dialogues.append(tuple(_turn(turn, "dialogues") for turn in dialogue))
    if not (captions or questions or dialogues):
        raise ValueError("it says nothing about its picture")
    return Row(image, tuple(captions), tuple(questions), tuple(dialogues))


def _turn(record: object, where: str) -> Turn:
    if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
        raise ValueError(f"{where}: a question needs both 'question' and 'answer'")
    return Turn(_text(record, "question"), _text(record, "answer"))


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f"{key!r} is missing")
    return _said(record[key], key)


def _said(value: object, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} has to be a text that is not empty, not {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # as broken JSON may have it
        raise ValueError(f"{key!r} has halves of characters, {value!r}; write it as Unicode") from None
    return value.strip()


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key!r} has to be a list, not {reprlib.repr(value)}")
    return value
