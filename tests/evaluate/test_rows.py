"""Scores of a model on rows with references: what is computed of what, and what is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import blip2
from blip2.errors import CollectionError, OptionError
from blip2.evaluate import ANSWERS, SCORES, evaluate
from blip2.tasks.speaker import Speaker

EXAMPLES = Path(__file__).parents[2] / "examples"
CATS, PICTURE = str(EXAMPLES / "cats.png"), str(EXAMPLES / "picture.png")
QUESTIONS = [
    {"image": CATS, "question": "how many cats are there?", "answer": "four", "type": "count"},
    {"image": PICTURE, "question": "how many dogs are there?", "answer": "three", "type": "count"},
    {"image": PICTURE, "question": "is there a dog?", "answers": ["yes"] * 2 + ["no"] * 8, "type": "exist"},
]


@pytest.fixture(scope="module")
def pipeline():
    return blip2.load()


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_are_compared_by_what_a_row_has(tmp_path, pipeline) -> None:
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    found = evaluate(rows, tmp_path / "out", model=pipeline)
    # Two of ten said yes: (2 x 1/3 + 8 x 2/3) / 10.
    assert found["scores"]["accuracy"]["score"] == pytest.approx(100 * (1 + 0 + 0.6) / 3)
    assert found["types"]["count"]["score"] == 50 and found["types"]["count"]["rows"] == 2
    assert found["types"]["exist"]["score"] == pytest.approx(60)
    counted = [*QUESTIONS[:2], {**QUESTIONS[2], "answers": {"yes": 2, "no": 8}}]
    again = evaluate(write(tmp_path / "counted.jsonl", counted), tmp_path / "again", model=pipeline)
    assert again["types"] == found["types"]
    assert found["rule"] == "official" and found["failed"] == 0
    low, high = found["scores"]["accuracy"]["low"], found["scores"]["accuracy"]["high"]
    assert low <= found["scores"]["accuracy"]["score"] <= high
    assert json.loads((tmp_path / "out" / SCORES).read_text()) == found
    all_ten = evaluate(rows, tmp_path / "out", model=pipeline, rule="all-ten")
    assert all_ten["types"]["exist"]["score"] == pytest.approx(100 * 2 / 3)


def test_questions_in_words_of_ones_own(tmp_path, pipeline, monkeypatch) -> None:
    rows = write(tmp_path / "rows.jsonl", QUESTIONS[:2])
    asked: list[str] = []
    answers = Speaker.answers

    def listening(speaker, images, prompts, *rest):
        asked.extend(prompts)
        return answers(speaker, images, prompts, *rest)

    monkeypatch.setattr(Speaker, "answers", listening)
    evaluate(rows, tmp_path / "out", model=pipeline, question_prompt="{} Say it:")
    assert asked == ["how many cats are there? Say it:", "how many dogs are there? Say it:"]
    with pytest.raises(CollectionError, match="wording"):  # the answers there are to other words
        evaluate(rows, tmp_path / "out", model=pipeline)


def test_words_around_questions_that_do_not_fit(tmp_path, pipeline) -> None:
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    with pytest.raises(OptionError, match="once, where the question goes"):
        evaluate(rows, tmp_path / "out", model=pipeline, question_prompt="Answer:")
    with pytest.raises(OptionError, match="use question_prompt"):
        evaluate(rows, tmp_path / "out", model=pipeline, prompt="a photo of")
    write(rows, [{"image": CATS, "captions": ["a cat"]}])
    with pytest.raises(OptionError, match=r"rows\.jsonl has none"):
        evaluate(rows, tmp_path / "out", model=pipeline, question_prompt="{}")
    assert not (tmp_path / "out").exists()


def test_captions_beside_several_references(tmp_path, pipeline) -> None:
    said = pipeline.caption([CATS, PICTURE])
    rows = [
        {"image": CATS, "captions": [said[0], "something else"]},
        {"image": PICTURE, "captions": [said[1] + ".", "two words"]},
    ]
    found = evaluate(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline)
    assert found["scores"]["BLEU-4"]["score"] == pytest.approx(100)
    assert found["scores"]["ROUGE-L"]["score"] == pytest.approx(100)
    assert found["scores"]["CIDEr"]["score"] > 100
    assert "SPICE" in found["not_computed"]


def test_a_picture_that_cannot_be_read_counts_as_wrong(tmp_path, pipeline) -> None:
    rows = [QUESTIONS[0], {**QUESTIONS[0], "image": "gone.png"}]
    found = evaluate(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline)
    assert found["failed"] == 1 and found["scores"]["accuracy"]["score"] == 50


def test_it_goes_on_where_it_was_and_says_what_is_missing(tmp_path, pipeline) -> None:
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    with pytest.raises(CollectionError, match=r"no answer to 2 of 3 rows"):
        evaluate(rows, tmp_path / "out", model=pipeline, limit=1)
    evaluate(rows, tmp_path / "out", model=pipeline)
    assert len((tmp_path / "out" / ANSWERS).read_text().splitlines()) == 3


def test_two_models_side_by_side(tmp_path, pipeline) -> None:
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    evaluate(rows, tmp_path / "one", model=pipeline)
    other = tmp_path / "two"
    evaluate(rows, other, model=pipeline)
    lines = [json.loads(line) for line in (other / ANSWERS).read_text().splitlines()]
    lines[0]["caption"] = "five"
    write(other / ANSWERS, lines)
    found = evaluate(rows, tmp_path / "one", model=pipeline, against=other)["against"]
    assert (found["changed"], found["better"], found["worse"]) == (1, 1, 0)
    assert found["first_changed"] == [{"row": 0, "was": "five", "is": "four"}]
    assert 0 < found["p"] <= 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no rows"),
        ("{", "rows.jsonl:1: is not JSON"),
        ('{"question": "q", "answer": "a"}', 'has no "image"'),
        ('{"image": "a.png", "question": "q"}', "has no references"),
        ('{"image": "a.png", "answer": "a"}', 'no "question"'),
        ('{"image": "a.png", "question": "q", "answers": []}', "has no references"),
        ('{"image": "a.png", "question": "q", "answers": [1]}', "has no references"),
        ('{"image": "a.png", "question": "q", "answers": {"a": -1}}', "has no references"),
        ('{"image": "a.png", "captions": ["a"]}\n{"image": "a.png", "question": "q", "answer": "a"}', "two files"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, rows, message) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    with pytest.raises(CollectionError, match=message):
        evaluate(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_rules_and_files_are_errors(tmp_path) -> None:
    with pytest.raises(OptionError, match="lavis"):
        evaluate(tmp_path / "rows.jsonl", tmp_path / "out", rule="mine")
    with pytest.raises(CollectionError, match="cannot be read"):
        evaluate(tmp_path / "rows.jsonl", tmp_path / "out")


def test_answers_of_other_rows_are_not_scored(tmp_path, pipeline) -> None:
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    evaluate(rows, tmp_path / "out", model=pipeline)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ANSWERS).write_text("not JSON\n")
    with pytest.raises(CollectionError, match=r"other/answers\.jsonl"):
        evaluate(rows, tmp_path / "out", model=pipeline, against=tmp_path / "other")


def test_captions_and_a_model_that_matches_are_a_retrieval(tmp_path) -> None:
    matcher = blip2.load("miniature-itm")
    (tmp_path / "cats.png").write_bytes(Path(CATS).read_bytes())
    rows = [
        {"image": "cats.png", "captions": ["four cats, two dogs and a flower"]},
        {"image": PICTURE, "captions": ["a boat and two dogs", "two dogs and a boat"]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    found = evaluate(path, tmp_path / "out", model=matcher, candidates=1)
    assert found["scores"]["text R@1"]["score"] == found["scores"]["image R@1, by vectors"]["score"] == 100
    with pytest.raises(OptionError, match="a matching model cannot answer"):
        evaluate(write(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / "other", model=matcher)
