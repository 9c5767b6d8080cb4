"""One row of training data: an image and its texts."""

from __future__ import annotations

import math
import random
import reprlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blip2.data.foreign import advice


class Turn(NamedTuple):
    """A question and its answer. ``answers``: answers of several people with their counts, the most frequent first;
    ``answer`` is then the first."""

    question: str
    answer: str
    answers: tuple[tuple[str, float], ...] = ()

    def drawn(self, chance: random.Random) -> str:
        """Draw an answer with the frequencies of ``answers``. With a single answer no random number is used."""
        if not self.answers:
            return self.answer
        return chance.choices([text for text, _ in self.answers], [count for _, count in self.answers])[0]


@dataclass(frozen=True, slots=True)
class Row:
    """``image``: path of the image. A dialogue is a list of turns, where later ones refer to earlier ones. ``content``:
    the image file's bytes if it is inside another file; ``image`` is then only its name for messages."""

    image: str
    captions: tuple[str, ...] = ()
    questions: tuple[Turn, ...] = ()
    dialogues: tuple[tuple[Turn, ...], ...] = ()
    content: bytes | None = field(default=None, repr=False)


def parse_row(record: object) -> Row:
    """A decoded JSON object to a `Row`; unknown keys are ignored.

    ``image`` (text) is required; then any of ``caption`` or ``text`` (text), ``captions`` (list of texts), ``question``
    with ``answer``, ``questions`` (list of objects with both), ``dialogues`` (list of lists of them). Instead of
    ``answer`` there may be ``answers``: the number of people who gave each ({"yes": 7, "no": 3}), or a list with the
    answer of each. Raises ValueError that says what is wrong, and how to change a row of another tool.
    """
    try:
        return _parsed(record)
    except ValueError as error:
        raise ValueError(f"{error}; {advice(record)}") from None


def _parsed(record: object) -> Row:
    if not isinstance(record, dict):
        raise ValueError('it is not an object like {"image": ...}')
    image = _text(record, "image")
    captions = [_text(record, key) for key in ("caption", "text") if key in record]
    captions += [_said(text, "captions") for text in _list(record, "captions")]
    questions = [_turn(turn, "questions") for turn in _list(record, "questions")]
    if record.keys() & {"question", "answer", "answers"}:
        questions.append(_turn(record, "the row"))
    dialogues = []
    for dialogue in _list(record, "dialogues"):
        if not isinstance(dialogue, list) or not dialogue:
            raise ValueError("a dialogue has to be a list of turns, each with question and answer")
        dialogues.append(tuple(_turn(turn, "dialogues") for turn in dialogue))
    if not (captions or questions or dialogues):
        raise ValueError("it has no text about its image")
    return Row(image, tuple(captions), tuple(questions), tuple(dialogues))


def _turn(record: object, where: str) -> Turn:
    if not isinstance(record, dict) or "question" not in record or not record.keys() & {"answer", "answers"}:
        raise ValueError(f"{where}: a question needs both 'question' and 'answer'")
    question = _text(record, "question")
    if "answers" not in record:
        return Turn(question, _text(record, "answer"))
    answers = _counted(record["answers"])
    return Turn(question, answers[0][0], answers if len(answers) > 1 else ())


def _counted(value: object) -> tuple[tuple[str, float], ...]:
    """The most frequent first; among equals the one that came first."""
    counts: dict[str, float] = {}
    if isinstance(value, dict):
        for answer, count in value.items():
            if isinstance(count, bool) or not isinstance(count, int | float) or not 0 < count < math.inf:
                raise ValueError(f"'answers': {answer!r} has the count {count!r}, but it has to be a number above 0")
            counts[_said(answer, "answers")] = count
    elif isinstance(value, list):
        for answer in value:
            text = _said(answer.get("answer") if isinstance(answer, dict) else answer, "answers")
            counts[text] = counts.get(text, 0) + 1
    if not counts:
        raise ValueError(f"'answers' has to be a list of texts or {{text: count}}, not {reprlib.repr(value)}")
    return tuple(sorted(counts.items(), key=lambda item: -item[1]))


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise ValueError(f"{key!r} is missing")
    return _said(record[key], key)


def _said(value: object, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} has to be a non-empty text, not {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # possible in broken JSON
        raise ValueError(f"{key!r} has unpaired surrogates, {value!r}; write it as Unicode") from None
    return value.strip()


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key!r} has to be a list, not {reprlib.repr(value)}")
    return value
