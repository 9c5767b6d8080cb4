"""Scores of a model on rows that have references: what it says is collected, as any collection is, and compared.

A row of the JSON-lines file names a picture, and has either a ``question`` with an ``answer`` or several ``answers``
(those of the people who were asked, or how many gave each), or ``captions`` (references), as ``blip2 rows`` writes
them. ``type``, of the question, makes a table by type.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.api.collect import CollectionRun, asking, captioning
from blip2.collection.summary import OnResults
from blip2.errors import CollectionError, OptionError, option
from blip2.plaintext import NotTextError, read_lines
from blip2.scores import VQA_RULES, bleu, cider, interval, paired, rouge_l, vqa_accuracy
from blip2.scores.tokens import tokens

ANSWERS, SCORES = "answers.jsonl", "scores.json"
MOST_SHOWN = 20
"""Of the rows whose answers another model gave otherwise."""
NOT_COMPUTED = ("METEOR", "SPICE")
"""Programs in Java, which others' tables of captions have."""


@dataclass(frozen=True)
class Example:
    """A row. ``wanted``: captions (``question`` is None then), or answers: one, which is compared letter by letter, or
    those of several people (``are_people``). ``kind``: the type of the question, "" where rows have none."""

    picture: str
    question: str | None
    wanted: tuple[str, ...]
    are_people: bool
    kind: str


@dataclass(frozen=True)
class Evaluation:
    """What is checked and can begin. ``run``: collects what the model says; the same call goes on where it was."""

    examples: Sequence[Example]
    rule: str
    folder: Path
    run: CollectionRun

    @property
    def num_missing(self) -> int:
        """Rows that nothing is known of yet. Raises CollectionError."""
        path = self.folder / ANSWERS
        return len(self.examples) - (sum(1 for _ in read_lines(path)) if path.exists() else 0)

    def scores(self, against: Path | None = None) -> dict[str, Any]:
        """What was said, compared; written to scores.json as well. ``against``: the folder of another model's
        evaluation of the same rows. Raises CollectionError where answers are missing, or are not of these rows."""
        said = _said(self.folder, len(self.examples))
        compare = _captions if self.examples[0].question is None else _answers
        each, totals = compare(self.examples, said, self.rule)
        found: dict[str, Any] = {
            "rows": len(self.examples), "failed": sum(text is None for text in said), "scores": totals,
            "types": _by_type(self.examples, each),
        }  # fmt: skip
        if any(example.are_people for example in self.examples):
            found["rule"] = self.rule
        if compare is _captions:
            found["not_computed"] = list(NOT_COMPUTED)
        if against is not None:
            others = _said(against, len(self.examples))
            theirs, _ = compare(self.examples, others, self.rule)
            pictures = [example.picture for example in self.examples]
            changed = [
                {"row": row, "was": before, "is": now}
                for row, (before, now) in enumerate(zip(others, said, strict=True))
                if before != now
            ]
            found["against"] = {
                "folder": str(against), "mean": sum(theirs) / len(theirs), "changed": len(changed),
                "better": sum(ours > other for ours, other in zip(each, theirs, strict=True)),
                "worse": sum(ours < other for ours, other in zip(each, theirs, strict=True)),
                "p": paired(each, theirs, pictures), "first_changed": changed[:MOST_SHOWN],
            }  # fmt: skip
        disk.write_text(self.folder / SCORES, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return found


def evaluating(rows: Path, folder: Path, *, rule: str = "official", **options: Any) -> Evaluation:
    """All that can be known to be wrong is told here. ``options``: those of `blip2.caption_collection` or
    `blip2.ask_collection`: ``model``, how it decodes, ``limit``, ``shard``, ...

    Raises CollectionError with file and line for a row that cannot be used, OptionError.
    """
    if rule not in VQA_RULES:
        raise OptionError(f"{option('rule')} is {rule!r}; it may be {', '.join(VQA_RULES)}")
    examples = _read(rows)
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"key_column": "row", "image_column": "image"}
    where |= {"output": folder / ANSWERS, "format": "jsonl"}
    if examples[0].question is None:
        run = captioning(rows, **where, if_exists="overwrite", **options)
    else:
        run = asking(rows, **where, question_column="question", **options)
    return Evaluation(examples, rule, folder, run)


def evaluate(
    rows: str | Path,
    folder: str | Path,
    *,
    against: str | Path | None = None,
    on_results: OnResults = lambda summary, results: None,
    **options: Any,
) -> dict[str, Any]:
    """Ask a model about all rows and compare: ``scores`` with 95 % intervals, ``types`` of questions, and with
    ``against`` what has changed. See `evaluating` for options and errors."""
    evaluation = evaluating(Path(rows), Path(folder), **options)
    evaluation.run.run(on_results)
    return evaluation.scores(None if against is None else Path(against))


# ---- rows and what was said ----


def _read(rows: Path) -> list[Example]:
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
        raise CollectionError(f"{rows}: has captions and questions; divide it into two files")
    return examples


def _example(line: str, place: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise CollectionError(f"{place}: is not JSON; write one object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise CollectionError(f'{place}: has no "image"; name a picture in each row')
    question, kind = row.get("question"), row.get("type", "")
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
        raise CollectionError(f'{place}: has answers and no "question"')
    return Example(row["image"], question, tuple(wanted), name == "answers" and len(wanted) > 1, str(kind))


def _said(folder: Path, number: int) -> list[str | None]:
    """By row; None for a picture that could not be read."""
    path = folder / ANSWERS
    said: dict[int, str | None] = {}
    try:
        for line in read_lines(path):
            row = json.loads(line)
            said[int(row["key"])] = row["caption"] if row["status"] == "success" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CollectionError(f"{path}: cannot be read ({error}); evaluate with {option('restart')}") from None
    if missing := number - len(said):
        raise CollectionError(f"{path}: has no answer to {missing} of {number} rows; the same command goes on")
    return [said[row] for row in range(number)]


# ---- how they are compared: a score for each row, and those of all rows by name ----

Compared = tuple[list[float], dict[str, dict[str, float]]]


def _captions(examples: Sequence[Example], said: Sequence[str | None], rule: str) -> Compared:
    """Of pictures: the rows of one are its references together."""
    texts = tokens([text or "" for text in said])
    flat = iter(tokens([text for example in examples for text in example.wanted]))
    references = [[next(flat) for _ in example.wanted] for example in examples]
    each, pictures = cider(texts, references), [example.picture for example in examples]
    rouge = rouge_l(texts, references)
    totals = {f"BLEU-{order}": _only(100 * score) for order, score in enumerate(bleu(texts, references), start=1)}
    totals |= {"ROUGE-L": _with_interval(rouge, pictures), "CIDEr": _with_interval(each, pictures)}
    return each, totals


def _answers(examples: Sequence[Example], said: Sequence[str | None], rule: str) -> Compared:
    each = []
    for example, text in zip(examples, said, strict=True):
        if text is None:
            each.append(0.0)
        elif example.are_people:
            each.append(vqa_accuracy(text, example.wanted, rule))
        else:
            each.append(float(text == example.wanted[0]))
    return each, {"accuracy": _with_interval(each, [example.picture for example in examples])}


def _by_type(examples: Sequence[Example], each: Sequence[float]) -> dict[str, dict[str, float]]:
    found = {}
    for kind in sorted({example.kind for example in examples} - {""}):
        of_kind = [place for place, example in enumerate(examples) if example.kind == kind]
        pictures = [examples[place].picture for place in of_kind]
        found[kind] = _with_interval([each[place] for place in of_kind], pictures) | {"rows": len(of_kind)}
    return found


def _with_interval(scores: Sequence[float], pictures: Sequence[str]) -> dict[str, float]:
    """In percent."""
    low, high = interval(scores, pictures)
    return {"score": 100 * sum(scores) / len(scores), "low": 100 * low, "high": 100 * high}


def _only(score: float) -> dict[str, float]:
    return {"score": score}
