"""Rows of JSON-lines files, and what is said about broken ones."""

import json
import random
from collections import Counter

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
        ('{"image": ""}', "'image' has to be a non-empty text"),
        ('{"image": "a"}', "has no text about its image"),
        ('{"image": "a", "caption": 3}', "'caption' has to be a non-empty text, not 3"),
        ('{"image": "a", "captions": "a dog"}', "'captions' has to be a list"),
        ('{"image": "a", "captions": ["a dog", ""]}', "'captions' has to be a non-empty text"),
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


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('[{"image": "a.png", "caption": "a"}]', "this is a JSON array; convert it with 'blip2 rows'"),
        ('[{"image": "a", "conversations": []}]', "write 'conversations' as"),
        ('{"file_name": "a.png", "text": "a"}', "rename 'file_name' to 'image'"),
        ('{"image": "a", "question": "how?", "answer": ["two", "2"]}', "rename 'answer' to 'answers'"),
        ('{"image": "a", "question": "how?", "answers": "two"}', 'write "answers" as a list of texts'),
        ('{"image": "a", "question": "how?", "answers": {"two": 0}}', "has the count 0"),
        ('{"image": "a", "question": "how?", "answers": []}', "has to be a list of texts or {text: count}, not []"),
        ('{"image": "a", "question": "how?", "multiple_choice_answer": "b"}', "rename 'multiple_choice_answer'"),
        ('{"image": "a", "conversations": [{"from": "human", "value": "<image>"}]}', '"dialogues": [[{"question": ...'),
        ('{"info": {}, "images": [], "annotations": []}', "this is a COCO file"),
        ('{"image_id": 9, "caption": "a"}', "'image_id' alone does not say where it is"),
        ('{"image": "a", "caption": ["a", "b"]}', "rename 'caption' to 'captions'"),
        ('{"image": "a", "captoin": "a"}', "rename 'captoin' to 'caption'"),
        ('{"image": "a", "description": "a"}', "rename 'description' to 'caption'"),
        ('{"image": {"path": "a"}, "caption": "a"}', "write the path of the image file"),
        ("image,caption", "not JSON"),
        ('{"image": "a", "caption": "\\ud83d"}', "unpaired surrogates"),
    ],
)  # fmt: skip
def test_rows_of_other_tools_are_told_what_to_change(tmp_path, line, advice):
    with pytest.raises(RecipeError, match=r"rows\.jsonl:1: ") as raised:
        read_rows([write(tmp_path / "rows.jsonl", line)])
    assert advice in str(raised.value)
    assert 'a row is one line such as {"image": "a.jpg", "caption": "two dogs"}' in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "advice"),
    [([{"image": "a.png", "caption": "a"}], "this is a JSON array"), ({"images": [], "annotations": []}, "COCO file")],
)
def test_a_file_that_is_one_value_is_known(tmp_path, content, advice):
    (tmp_path / "rows.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(RecipeError, match=rf"rows\.json: .*{advice}"):
        read_rows([tmp_path / "rows.json"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_rows_as_any_editor_saves_them(tmp_path, encoding):
    text = '{"image": "a.png", "caption": "naïve \u2028 café"}\r\n\r\n{"image": "b.png", "caption": "b"}'
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "rows.jsonl").write_bytes((mark + text).encode(encoding))
    assert [row.captions for row in read_rows([tmp_path / "rows.jsonl"])] == [("naïve \u2028 café",), ("b",)]


@pytest.mark.parametrize("content", ["é".encode("latin-1"), '{"image"'.encode("utf-16-le"), b"PAR1\xff\xfe"])
def test_rows_that_are_no_text(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(RecipeError, match=r"rows\.jsonl: is not UTF-8 text .*; save it as UTF-8; a row is"):
        read_rows([tmp_path / "rows.jsonl"])


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.jsonl: cannot be read"):
        read_rows([tmp_path / "absent.jsonl"])
    with pytest.raises(RecipeError, match="has no rows"):
        read_rows([write(tmp_path / "empty.jsonl")])


def test_answers_of_several_people(tmp_path):
    """The most frequent is the answer; each is drawn as often as it was given."""
    file = write(
        tmp_path / "rows.jsonl",
        {"image": "a.png", "question": "how many?", "answers": {"two": 3, "2": 6, "three": 1}},
        {"image": "a.png", "question": "how many?", "answers": ["two", {"answer": "2"}, "two"], "answer": "some"},
        {"image": "a.png", "question": "how many?", "answers": ["two", "two"]},
    )
    counted, listed, agreed = [row.questions[0] for row in read_rows([file])]
    assert counted == Turn("how many?", "2", (("2", 6), ("two", 3), ("three", 1)))
    assert listed == Turn("how many?", "two", (("two", 2), ("2", 1)))
    assert agreed == Turn("how many?", "two")
    chance = random.Random(0)
    drawn = Counter(counted.drawn(chance) for _ in range(10_000))
    assert {answer: round(count / 1000) for answer, count in drawn.items()} == {"2": 6, "two": 3, "three": 1}
    state = chance.getstate()
    assert agreed.drawn(chance) == "two" and chance.getstate() == state  # earlier rows keep their order of draws


def test_addresses_are_to_be_downloaded(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"image": "https://a.b/c.jpg", "caption": "a"})
    with pytest.raises(RecipeError, match=r"rows\.jsonl:1: https://a\.b/c\.jpg is a URL; download"):
        read_rows([file])
