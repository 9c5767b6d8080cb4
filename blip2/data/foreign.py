"""Advice for rows in the formats of other tools: what to change so that they can be read.

Covers annotations of LAVIS and COCO, Hugging Face's imagefolder metadata, VQAv2 and LLaVA.
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
CONVERSATION_KEYS = ("conversations", "conversation", "messages", "dialogue", "dialog", "turns", "qa_pairs")
CONVERT = "convert it with 'blip2 rows'"
ARRAY = f"this is a JSON array; {CONVERT}, or write each object on a line of its own (jq -c '.[]' FILE)"


def advice(record: object) -> str:
    """What to change in an unusable row, and what a row should look like."""
    return "; ".join([*_changes(record), WANTED])


def _changes(record: object) -> Iterator[str]:
    if isinstance(record, list):
        yield ARRAY
        yield from _changes(record[0] if record and isinstance(record[0], dict) else None)
    if not isinstance(record, dict):
        return
    if {"images", "annotations"} <= record.keys():
        yield (
            f"this is a COCO file; {CONVERT}, or write one line for each annotation, with the file_name of its image "
            "as 'image'"
        )
        return
    if {"questions", "annotations"} & record.keys() and "image" not in record:
        yield (
            f"this is a whole annotation file; {CONVERT}, or write one line for each annotation, with its image file "
            "as 'image'"
        )
        return
    yield from _image(record)
    yield from _caption(record)
    yield from _answer(record)
    for key in record.keys() & set(CONVERSATION_KEYS):
        yield (
            f'write {key!r} as "dialogues": [[{{"question": ..., "answer": ...}}, ...]], without <image> and without '
            'the speakers'
        )


def _image(record: dict[str, Any]) -> Iterator[str]:
    if "image" not in record:
        if near := _first(record, IMAGES):
            yield f"rename {near!r} to 'image'"
        elif "image_id" in record:
            yield "write the image file as 'image'; 'image_id' alone does not say where it is"
        elif near := _near(record, "image"):
            yield f"rename {near!r} to 'image'"
    elif isinstance(record["image"], dict):
        yield "write the path of the image file as 'image'"


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
        yield "rename 'answer' to 'answers', which are drawn as often as they were given"
    elif "answer" not in record:
        if "multiple_choice_answer" in record:
            yield "rename 'multiple_choice_answer' to 'answer'"
        elif "answers" in record:
            yield 'write "answers" as a list of texts, or with the number of people who gave each: {"yes": 7, "no": 3}'


def _first(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _near(record: dict[str, Any], *wanted: str) -> str | None:
    """A misspelt key."""
    unknown = [key for key in record if isinstance(key, str) and key not in KEYS]
    return next((key for key in unknown if difflib.get_close_matches(key, wanted, n=1, cutoff=0.75)), None)
