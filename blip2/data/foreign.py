"""Rows as other tools write them: what to change so that they can be read here.

Known are the annotations of LAVIS and COCO, imagefolder's metadata of Hugging Face's datasets, VQAv2 and LLaVA.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

WANTED = (
    'a row is one line such as {"image": "a.jpg", "caption": "two dogs"} or '
    '{"image": "a.jpg", "question": "how many dogs?", "answer": "two"}'
)
KEYS = ("image", "caption", "captions", "text", "question", "answer", "questions", "dialogues")
IMAGES = (
    "file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "image_file", "img", "img_path",
    "image_name", "url", "image_url", "picture", "photo",
)  # fmt: skip
CAPTIONS = ("sentence", "sentences", "raw", "description", "title", "alt_text", "label", "output")
TALKS = ("conversations", "conversation", "messages", "dialogue", "dialog", "turns", "qa_pairs")
CONVERT = "make rows of it by 'blip2 rows'"
ARRAY = f"this is a JSON array; {CONVERT}, or write each of its objects on a line of its own (jq -c '.[]' FILE)"


def advice(record: object) -> str:
    """What to change in a row that cannot be used, and what a row should be."""
    return "; ".join([*_changes(record), WANTED])


def _changes(record: object) -> Iterator[str]:
    if isinstance(record, list):
        yield ARRAY
        yield from _changes(record[0] if record and isinstance(record[0], dict) else None)
    if not isinstance(record, dict):
        return
    if {"images", "annotations"} <= record.keys():
        yield (
            f"this is a file of COCO's; {CONVERT}, or write a line for each of its annotations, with the file_name of "
            "its image as 'image'"
        )
        return
    if {"questions", "annotations"} & record.keys() and "image" not in record:
        yield (
            f"this is a whole file of annotations; {CONVERT}, or write a line for each, with the file of its picture "
            "as 'image'"
        )
        return
    yield from _image(record)
    yield from _caption(record)
    yield from _answer(record)
    for key in record.keys() & set(TALKS):
        yield (
            f'write what {key!r} has as "dialogues": [[{{"question": ..., "answer": ...}}, ...]], without <image> and '
            "without who speaks"
        )


def _image(record: dict[str, Any]) -> Iterator[str]:
    if "image" not in record:
        if near := _first(record, IMAGES):
            yield f"rename {near!r} to 'image'"
        elif "image_id" in record:
            yield "write the file of the picture as 'image'; 'image_id' alone does not tell where it lies"
        elif near := _near(record, "image"):
            yield f"rename {near!r} to 'image'"
    elif isinstance(record["image"], dict):
        yield "write the path of the picture's file as 'image'"


def _caption(record: dict[str, Any]) -> Iterator[str]:
    for key in ("caption", "text"):
        if isinstance(record.get(key), list):
            yield f"rename {key!r} to 'captions'"
    if isinstance(record.get("captions"), str):
        yield "rename 'captions' to 'caption'"
    if not record.keys() & {"caption", "captions", "text", "question", "questions", "dialogues"}:
        if near := _first(record, CAPTIONS):
            yield f"rename {near!r} to 'caption', or to 'captions' if it is a list of texts"
        elif near := _near(record, *KEYS[1:]):
            [meant] = difflib.get_close_matches(near, KEYS[1:], n=1)
            yield f"rename {near!r} to {meant!r}"


def _answer(record: dict[str, Any]) -> Iterator[str]:
    if isinstance(record.get("answer"), list):
        yield "rename 'answer' to 'answers', of which each is drawn as often as people gave it"
    elif "answer" not in record:
        if "multiple_choice_answer" in record:
            yield "rename 'multiple_choice_answer' to 'answer'"
        elif "answers" in record:
            yield 'write "answers" as a list of texts, or with how many people gave each: {"yes": 7, "no": 3}'


def _first(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _near(record: dict[str, Any], *wanted: str) -> str | None:
    """A key that is misspelt."""
    unknown = [key for key in record if isinstance(key, str) and key not in KEYS]
    return next((key for key in unknown if difflib.get_close_matches(key, wanted, n=1, cutoff=0.75)), None)
