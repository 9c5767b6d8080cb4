"""Texts as the authors' library trains on them (LAVIS, ``blip_caption`` and ``blip_question``)."""

from __future__ import annotations

import re
from dataclasses import replace

from blip2.data.sample import Row, Turn

SIGNS = re.compile(r'[.!"()*#:;~]')
MOST_WORDS = 50


def cleaned(row: Row) -> Row:
    """Captions and questions; answers stay as they are."""
    return replace(
        row,
        captions=tuple(map(clean_caption, row.captions)),
        questions=tuple(map(_turn, row.questions)),
        dialogues=tuple(tuple(map(_turn, dialogue)) for dialogue in row.dialogues),
    )


def clean_caption(text: str) -> str:
    """In small letters, with a space for each of `SIGNS`, and 50 words at most. One that has nothing else stays."""
    return _short(re.sub(r"\s{2,}", " ", SIGNS.sub(" ", text.lower()))) or text


def clean_question(text: str) -> str:
    """As `clean_caption`, but the signs are left out."""
    return _short(SIGNS.sub("", text.lower())) or text


def _turn(turn: Turn) -> Turn:
    return turn._replace(question=clean_question(turn.question))


def _short(text: str) -> str:
    return " ".join(text.strip().split(" ")[:MOST_WORDS])
