"""Text normalisation as in the authors' library (LAVIS, ``blip_caption`` and ``blip_question``)."""

from __future__ import annotations

import re
from dataclasses import replace

from blip2.data.sample import Row, Turn

SIGNS = re.compile(r'[.!"()*#:;~]')
MOST_WORDS = 50


def cleaned(row: Row) -> Row:
    """A row with normalised captions and questions; answers are unchanged."""
    return replace(
        row,
        captions=tuple(map(clean_caption, row.captions)),
        questions=tuple(map(_turn, row.questions)),
        dialogues=tuple(tuple(map(_turn, dialogue)) for dialogue in row.dialogues),
    )


def clean_caption(text: str) -> str:
    """Lower-case, each of `SIGNS` replaced by a space, at most 50 words. A text that would become empty is
    unchanged."""
    return _short(re.sub(r"\s{2,}", " ", SIGNS.sub(" ", text.lower()))) or text


def clean_question(text: str) -> str:
    """As `clean_caption`, but the signs are removed."""
    return _short(SIGNS.sub("", text.lower())) or text


def _turn(turn: Turn) -> Turn:
    return turn._replace(question=clean_question(turn.question))


def _short(text: str) -> str:
    return " ".join(text.strip().split(" ")[:MOST_WORDS])
