"""Result files for the servers of challenges, and for the official programs of data sets.

    coco     [{"image_id": 1, "caption": "a cat"}]                      COCO, NoCaps
    vqa      [{"question_id": 1, "answer": "two"}]                      VQAv2, OK-VQA: EvalAI
    gqa      [{"questionId": "1", "prediction": "two"}]
    aokvqa   {"22jbM6": {"direct_answer": "two"}}                       or "multiple_choice"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.errors import CollectionError
from blip2.evaluate.benchmark import CHOOSE, Benchmark
from blip2.evaluate.examples import Example


def write(benchmark: Benchmark, folder: Path, examples: Sequence[Example], outputs: Sequence[str | None]) -> Path:
    """Write the texts by id, with an empty text for an unreadable image, because servers require every id.

    Raises CollectionError for an id that the server cannot know, or that occurs twice.
    """
    path = folder / benchmark.result
    make, is_number = FORMS[benchmark.server]
    texts: dict[int | str, str] = {}
    for example, text in zip(examples, outputs, strict=True):
        name = _number(example, path) if is_number else str(example.id)
        if name in texts:
            raise CollectionError(f"{path}: {example.image} has the id {name}, like another row; fix the data")
        texts[name] = text or ""
    found = make({name: texts[name] for name in sorted(texts)}, benchmark)
    disk.write_text(path, json.dumps(found, ensure_ascii=False) + "\n")
    return path


def _number(example: Example, path: Path) -> int:
    if isinstance(example.id, int) and not isinstance(example.id, bool):
        return example.id
    raise CollectionError(f"{path}: {example.image} has the id {example.id!r}, but it has to be a number; fix the "
        "data")


def _coco(texts: dict[Any, str], benchmark: Benchmark) -> Any:
    return [{"image_id": name, "caption": text} for name, text in texts.items()]


def _vqa(texts: dict[Any, str], benchmark: Benchmark) -> Any:
    return [{"question_id": name, "answer": text} for name, text in texts.items()]


def _gqa(texts: dict[Any, str], benchmark: Benchmark) -> Any:
    return [{"questionId": name, "prediction": text} for name, text in texts.items()]


def _aokvqa(texts: dict[Any, str], benchmark: Benchmark) -> Any:
    name = "multiple_choice" if benchmark.task == CHOOSE else "direct_answer"
    return {question: {name: text} for question, text in texts.items()}


FORMS: dict[str, tuple[Callable[[dict[Any, str], Benchmark], Any], bool]] = {
    "coco": (_coco, True), "vqa": (_vqa, True), "gqa": (_gqa, False), "aokvqa": (_aokvqa, False),
}  # fmt: skip
"""By name: the function that makes it of texts by id, and whether its ids are numbers."""
