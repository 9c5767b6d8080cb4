"""Rows varied: what is asked, what counts as changed, and that rotation and company change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import blip2
from blip2.errors import CollectionError, OptionError
from blip2.evaluate import ANSWERS, ROBUSTNESS, SCORES, begun, evaluate, varying
from blip2.image import load_image, save_image
from tests import tiny
from tests.evaluate.written import LAYOUTS, drawn

EXAMPLES = Path(__file__).parents[2] / "examples"
CATS, PICTURE = str(EXAMPLES / "cats.png"), str(EXAMPLES / "picture.png")
QUESTIONS = [
    {"image": CATS, "question": "how many cats are there?", "answer": "four"},
    {"image": PICTURE, "question": "how many dogs are there?", "answer": "two"},
    {"image": PICTURE, "question": "is there a dog?", "answers": ["yes"] * 8 + ["no"] * 2},
]
OF_PICTURES = ["JPEG quality 90", "JPEG quality 50", "JPEG quality 20", "middle 95%", "middle 85%", "EXIF rotation"]
OF_QUESTIONS = ["first letter", "question mark", "in this picture", "please"]
ALL = [*OF_QUESTIONS, *OF_PICTURES, "other company"]


@pytest.fixture(scope="module")
def pipeline():
    return blip2.load()


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def robustness(rows: Path, folder: Path, **options):
    return evaluate(ROBUSTNESS, folder, data=rows, **options)


def test_every_row_is_asked_as_it_is_and_by_each_variation(tmp_path, pipeline):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    found = robustness(rows, tmp_path / "out", model=pipeline)
    asked = read(tmp_path / "out" / "rows.jsonl")
    assert [row["question"] for row in asked[:3]] == [row["question"] for row in QUESTIONS]
    assert {row["type"] for row in asked[:3]} == {"as it is"}
    for name in ALL:
        assert sorted(row["of"] for row in asked if row["type"] == name) == [0, 1, 2]
    words = {row["type"]: row["question"] for row in asked if row["of"] == 2 and row["image"] == PICTURE}
    assert words["first letter"] == "Is there a dog?" and words["question mark"] == "is there a dog"
    assert words["in this picture"] == "in this picture, is there a dog?"
    assert all(row.get("answers", row.get("answer")) for row in asked)
    assert found["rows"] == 3 and found["failed"] == 0 and found["model"] == "miniature"
    assert [*found["scores"]] == [f"changed, {name}" for name in ALL]
    assert found["types"].keys() == {"as it is", *ALL}
    assert json.loads((tmp_path / "out" / SCORES).read_text()) == found


@pytest.mark.slow
def test_rotation_and_company_change_nothing(tmp_path, pipeline):
    """Pictures that are not square, lie in each of the seven other ways, with texts of different lengths about them."""
    rows = []
    for number, each in enumerate(drawn()):
        (tmp_path / f"{number}.png").write_bytes(each.content)
        rows += [{"image": f"{number}.png", "question": question, "answer": answer}
                 for question, answer in each.questions]  # fmt: skip
    for number in range(8):
        save_image(tiny.picture(number).resize((90 + 7 * number, 60)), tmp_path / f"small-{number}.jpg")
        rows.append({"image": f"small-{number}.jpg", "question": "what is " * number + "in it", "answer": "no"})
    found = robustness(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline, batch_size=3)
    for name in ("EXIF rotation", "other company"):
        score = found["scores"][f"changed, {name}"]
        assert score["score"] == 0 and score["low"] == 0 and 10 < score["high"] < 20 and score["rows"] == len(rows)
    assert found["differences"] == []
    assert {path.stem[-1] for path in (tmp_path / "out" / "pictures").glob("*exif*")} == {*"2345678"}
    order = [row["of"] for row in read(tmp_path / "out" / "rows.jsonl") if row["type"] == "other company"]
    assert order != sorted(order)
    alone = robustness(tmp_path / "rows.jsonl", tmp_path / "alone", model=pipeline, batch_size=1)
    assert alone == found


def test_nor_do_they_of_photographs(tmp_path, pipeline):
    """Thirty-two of them, from cameras and programs of many kinds, with an answer that compression may well change."""
    images = sorted((Path(__file__).parents[1] / "photographs").glob("*.jpg"))
    rows = [{"image": str(image), "question": "what is the background?", "answer": "blue"} for image in images]
    found = robustness(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline, batch_size=5)
    changed = {name.removeprefix("changed, "): score["score"] for name, score in found["scores"].items()}
    assert len(rows) == 32 and found["failed"] == 0 and found["differences"] == []
    assert changed["EXIF rotation"] == changed["other company"] == 0
    assert changed["JPEG quality 20"] + changed["middle 85%"] > 0, "what is varied is seen by the model"


def test_pictures_are_what_their_variation_says(tmp_path, pipeline):
    begun(ROBUSTNESS, write(tmp_path / "rows.jsonl", QUESTIONS[:1]), tmp_path / "out", {"model": pipeline}).see()
    asked = {row["type"]: row["image"] for row in read(tmp_path / "out" / "rows.jsonl")}
    seen = {name: load_image(tmp_path / "out" / asked[name]) for name in OF_PICTURES}
    whole = load_image(CATS)
    assert np.array_equal(seen["EXIF rotation"], whole)
    assert seen["middle 85%"].size < seen["middle 95%"].size < whole.size == seen["JPEG quality 20"].size
    far = [np.abs(np.asarray(seen[name], int) - np.asarray(whole, int)).mean() for name in OF_PICTURES[:3]]
    assert 0 < far[0] < far[1] < far[2]


def changed(tmp_path, pipeline, change):
    """The scores where a model said what ``change`` makes of the rows."""
    evaluation = varying(write(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / "out", model=pipeline)
    evaluation.see()
    evaluation.run.run()
    asked, said = read(tmp_path / "out" / "rows.jsonl"), read(tmp_path / "out" / ANSWERS)
    for row, answer in zip(asked, said, strict=True):
        answer["caption"] = change(row)
    write(tmp_path / "out" / ANSWERS, said)
    return evaluation.scores()


def test_what_counts_as_changed(tmp_path, pipeline):
    def change(row):
        right = row.get("answer", "yes")
        return "five" if row["type"] == "JPEG quality 20" and row["of"] == 1 else right

    found = changed(tmp_path, pipeline, change)
    shares = {name: score["score"] for name, score in found["scores"].items()}
    assert shares.pop("changed, JPEG quality 20") == pytest.approx(100 / 3) and {*shares.values()} == {0}
    assert found["types"]["JPEG quality 20"]["score"] == pytest.approx(200 / 3)
    beside = found["against"]
    assert (beside["changed"], beside["better"], beside["worse"]) == (1, 0, 1)
    assert beside["first_changed"] == [{"row": 1, "type": "JPEG quality 20", "was": "two", "is": "five"}]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "before: two" in page and "now: <b>five</b>" in page and "<h2>Worse</h2>" in page


@pytest.mark.parametrize("name", ["EXIF rotation", "other company"])
def test_a_change_that_must_not_be_is_told(tmp_path, pipeline, name):
    found = changed(tmp_path, pipeline, lambda row: "five" if row["type"] == name else "yes")
    [told] = found["differences"]
    assert told.startswith(f"{name} changed 3 answers, but must change none")
    everything = found["scores"][f"changed, {name}"]
    assert everything["score"] == everything["high"] == 100 and everything["low"] < 50


def test_questions_in_words_of_ones_own_and_answers_that_are_not_known(tmp_path, pipeline):
    rows = [{"image": CATS, "question": "how many cats are there?", "unscored": True,
             "rephrased": ["count the cats", "how many dogs are there?"]}]  # fmt: skip
    found = robustness(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline)
    assert found["scores"]["changed, rephrased"]["rows"] == 2
    assert found["scores"]["changed, rephrased"]["score"] >= 50  # four cats, two dogs
    assert found["types"] == {} and "p" not in found["against"] and found["against"]["better"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Changed, neither better nor worse" in page and "not scored" in page


def test_captions(tmp_path, pipeline):
    rows = [{"image": CATS, "captions": ["four cats", "a flower"]}, {"image": PICTURE, "captions": ["two dogs"]}]
    found = robustness(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline, prompt="a picture of")
    assert [*found["scores"]] == [f"changed, {name}" for name in [*OF_PICTURES, "other company"]]
    assert found["types"]["as it is"] == found["types"]["other company"] == found["types"]["EXIF rotation"]


def test_it_goes_on_where_it_was(tmp_path, pipeline):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    whole = robustness(rows, tmp_path / "whole", model=pipeline)
    with pytest.raises(CollectionError, match="run the same command again to resume"):
        robustness(rows, tmp_path / "out", model=pipeline, limit=7)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").iterdir()}
    (gone := next(iter(first))).unlink()
    assert robustness(rows, tmp_path / "out", model=pipeline) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in first.items() if path != gone) and gone.exists()


def test_a_picture_that_cannot_be_read_is_not_counted(tmp_path, pipeline):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [*QUESTIONS, {**QUESTIONS[0], "image": "broken.png"}, {**QUESTIONS[0], "image": "gone.png"}]
    found = robustness(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline)
    assert found["rows"] == 5 and found["failed"] == 2
    assert {score["rows"] for score in found["scores"].values()} == {3}


def test_only_the_first_rows(tmp_path, pipeline):
    found = robustness(write(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / "out", model=pipeline, first=2)
    assert found["rows"] == 2


def test_what_does_not_fit(tmp_path, pipeline):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)

    def refused(data=rows, **options):
        with pytest.raises((OptionError, CollectionError)) as caught:
            begun(ROBUSTNESS, data, tmp_path / "out", options)
        assert "\n" not in str(caught.value) and not (tmp_path / "out" / ANSWERS).exists()
        return str(caught.value)

    assert "name their file with data" in refused(None)
    assert "name a file of rows" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "gone.jsonl")
    assert "give 1 or more" in refused(first=0)
    assert "protocol is for benchmarks" in refused(protocol="paper")
    assert "needs a generative model" in refused(model="miniature-itm")
    assert "it may be official" in refused(rule="mine")
    write(rows, [{**QUESTIONS[0], "image": "https://127.0.0.1/a.png"}])
    assert "is a URL; download the image" in refused()
    write(rows, [{**QUESTIONS[0], "rephrased": "how many?"}])
    assert 'rows.jsonl:1: "rephrased" has to be a list' in refused()


def test_it_is_not_for_two_models_or_the_folder_of_another_benchmark(tmp_path, pipeline):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS[:1])
    robustness(rows, tmp_path / "out", model=pipeline)
    with pytest.raises(OptionError, match="compares a model with itself"):
        robustness(rows, tmp_path / "out", model=pipeline, against=tmp_path / "out")
    LAYOUTS["vqav2"]["official"](tmp_path / "data")
    with pytest.raises(CollectionError, match="has an evaluation of robustness"):
        evaluate("vqav2", tmp_path / "out", data=tmp_path / "data", model=pipeline)
    evaluate("vqav2", tmp_path / "vqa", data=tmp_path / "data", model=pipeline, first=2)
    with pytest.raises(CollectionError, match="has an evaluation of vqav2"):
        robustness(rows, tmp_path / "vqa", model=pipeline)
