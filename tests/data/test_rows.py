"""Rows of JSON-lines files, and what is said about broken ones."""

import json

import pytest

from blip2.data import Row, Turn, read_rows
from blip2.errors import RecipeError


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_kind_of_text(tmp_path):
    turn = {"question": "how many?", "answer": "two", "type": "count"}
    file = write(
        tmp_path / "rows.jsonl",
        {"image": "a.png", "caption": " a dog ", "text": "a cat", "captions": ["a bird"], "width": 3},
        "",
        {"image": "b.png", "question": "who?", "answer": "me", "questions": [turn], "dialogues": [[turn, turn]]},
    )
    asked = Turn("how many?", "two")
    assert read_rows([file]) == [
        Row(str(tmp_path / "a.png"), captions=("a dog", "a cat", "a bird")),
        Row(str(tmp_path / "b.png"), questions=(asked, Turn("who?", "me")), dialogues=((asked, asked),)),
    ]


def test_several_files_and_a_folder_of_images(tmp_path):
    first = write(tmp_path / "first.jsonl", {"image": "a.png", "text": "a"})
    second = write(tmp_path / "second.jsonl", {"image": "/elsewhere/b.png", "text": "b"})
    assert [row.image for row in read_rows([first, second], tmp_path / "images")] == [
        str(tmp_path / "images" / "a.png"),
        "/elsewhere/b.png",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"text": "a"}', "'image' is missing"),
        ('{"image": ""}', "'image' has to be a text that is not empty"),
        ('{"image": "a"}', "says nothing about its picture"),
        ('{"image": "a", "caption": 3}', "'caption' has to be a text that is not empty, not 3"),
        ('{"image": "a", "captions": "a dog"}', "'captions' has to be a list"),
        ('{"image": "a", "captions": ["a dog", ""]}', "'captions' has to be a text that is not empty"),
        ('{"image": "a", "question": "who?"}', "needs both 'question' and 'answer'"),
        ('{"image": "a", "questions": [{"question": "who?"}]}', "questions: a question needs both"),
        ('{"image": "a", "dialogues": [[]]}', "a list of turns"),
        ('{"image": "a", "dialogues": [["hello"]]}', "dialogues: a question needs both"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, problem):
    file = write(tmp_path / "rows.jsonl", {"image": "a.png", "text": "a"}, line)
    with pytest.raises(RecipeError, match=r"rows\.jsonl:2: ") as raised:
        read_rows([file])
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.jsonl: cannot be read"):
        read_rows([tmp_path / "absent.jsonl"])
    with pytest.raises(RecipeError, match="no rows in it"):
        read_rows([write(tmp_path / "empty.jsonl")])
