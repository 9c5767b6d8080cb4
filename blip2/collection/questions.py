"""A view of a source as images with questions: one question for all, several, or one per row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from blip2.collection.record import Record, Unit
from blip2.collection.sinks import View
from blip2.errors import OptionError, option

QUESTION = "question"


class Questions(View):
    """Each record with each question, in its column "question". If a record occurs several times, the number of the
    question is appended to its key. ``column``: the column that holds the record's own question."""

    def __init__(self, view: View, questions: Sequence[str] = (), column: str = "") -> None:
        super().__init__(view)
        self._view = view
        self._questions = list(questions)
        self._column = column
        if column and questions:
            raise OptionError(f"{option('question_column')} and questions exclude each other; leave out one")

    @property
    def num_records(self) -> int | None:
        number = self._view.num_records
        return None if number is None else number * max(len(self._questions), 1)

    @property
    def images(self) -> Sequence[str] | None:
        return self._view.images

    def stamp(self, unit: Unit) -> str:
        if not self._column or self._view.description().get("source") != "files":  # other stamps cover the columns
            return self._view.stamp(unit)
        digest = hashlib.blake2b(self._view.stamp(unit).encode(), digest_size=16)
        for record in self._view.records(unit):
            digest.update(repr(record.columns.get(self._column)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def description(self) -> Mapping[str, Any]:
        return {**self._view.description(), "questions": self._questions, "question_column": self._column}

    def records(self, unit: Unit) -> Iterator[Record]:
        for record in self._view.records(unit):
            if self._column:
                yield self._own(record)
                continue
            for number, question in enumerate(self._questions):
                key = record.key if len(self._questions) == 1 else f"{record.key}#{number}"
                yield _asked(replace(record, key=key), question)

    def _own(self, record: Record) -> Record:
        question = record.columns.get(self._column)
        if isinstance(question, str) and question.strip():
            return _asked(record, question)
        what = f"there is no question in {self._column!r}"
        return replace(record, problem=record.problem or f"{record.name}: {what}")


def _asked(record: Record, question: str) -> Record:
    digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return replace(record, stamp=f"{record.stamp}-{digest}", columns={**record.columns, QUESTION: question},
                   asked=question)  # fmt: skip
