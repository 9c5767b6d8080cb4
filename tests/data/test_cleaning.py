"""Texts as LAVIS's processors make them."""

import pytest

from blip2.data import Row, Turn
from blip2.data.cleaning import clean_caption, clean_question, cleaned


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ("Two dogs.", "two dogs", "two dogs"),
        (' A "red" car; (old)! ', "a red car old", "a red car old"),
        ("What's this?", "what's this?", "what's this?"),
        ("a.b:c~d#e*f", "a b c d e f", "abcdef"),
        ("one  two\n", "one two", "one  two"),
        ("word " * 60, ("word " * 50).strip(), ("word " * 50).strip()),
        ("...", "...", "..."),  # nothing would be left to learn
    ],
)
def test_signs_and_small_letters(text, caption, question):
    assert (clean_caption(text), clean_question(text)) == (caption, question)


def test_answers_stay():
    turn = Turn("Who?!", "Me.", (("Me.", 2), ("You!", 1)))
    row = cleaned(Row("A.png", ("A dog.",), (turn,), ((turn, turn),), b"x"))
    asked = turn._replace(question="who?")
    assert row == Row("A.png", ("a dog",), (asked,), ((asked, asked),), b"x") and row.content == b"x"
