"""The page of an evaluation: what is on it, and that it is safe to open."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import blip2
from blip2 import disk
from blip2.evaluate import ANSWERS, evaluate, evaluating
from blip2.evaluate.report import MOST_ROWS, REPORT
from tests.evaluate.written import LAYOUTS

EXAMPLES = Path(__file__).parents[2] / "examples"
CATS, PICTURE = str(EXAMPLES / "cats.png"), str(EXAMPLES / "picture.png")
QUESTIONS = [
    {"image": CATS, "question": "how many cats are there?", "answer": "four", "type": "count"},
    {"image": PICTURE, "question": "how many dogs are there?", "answer": "three", "type": "count"},
    {"image": PICTURE, "question": "is there a dog?", "answers": ["yes"] * 8 + ["no"] * 2, "type": "<b>exist"},
]
KINDS = ["vqav2", "nocaps", "vqav2-test-dev", "aokvqa-choices", "coco-retrieval", "winoground"]
ATTACK = '<script>alert("1")</script>'


class Page(HTMLParser):
    """The text below each title, and what would be loaded from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.parts: dict[str, str] = {"": ""}
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self._is_title = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._is_title = tag == "h2"
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value[:5] != "data:"]

    def handle_data(self, data):
        if self._is_title:
            self.parts[data] = ""
            self._is_title = False
        else:
            self.parts[[*self.parts][-1]] += data


@pytest.fixture(scope="module")
def pipeline():
    return blip2.load()


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(folder: Path, other: Path, change) -> Path:
    """The answers of an evaluation, each changed: those of another model."""
    other.mkdir()
    rows = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    write(other / ANSWERS, rows)
    return other


def test_scores_types_and_rows(tmp_path, pipeline):
    evaluate(write(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / "out", model=pipeline)
    page = Page(tmp_path / "out" / REPORT)
    assert "accuracy" in page.parts["Scores"] and "66.67" in page.parts["Scores"]
    assert "count" in page.parts["By type"] and "50.00" in page.parts["By type"]
    assert "<b>exist" in page.parts["By type"]  # as text
    for part in ("Worst", "Confident mistakes"):
        assert "output: two" in page.parts[part] and "reference: three" in page.parts[part]
        assert "how many cats" not in page.parts[part]
    assert "output: four" in page.parts["Best"] and "reference: yes (8); no (2)" in page.parts["Best"]
    assert page.tags.count("img") == 4
    assert "prefers-color-scheme: dark" in (tmp_path / "out" / REPORT).read_text()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_benchmark_has_a_page_that_loads_nothing(tmp_path, name):
    pytest.importorskip("pyarrow")
    LAYOUTS[name]["official"](tmp_path / "data")
    found = evaluate(name, tmp_path / "out", data=tmp_path / "data")
    page = Page(tmp_path / "out" / REPORT)
    assert page.loaded == [] and not {"script", "link", "iframe"} & {*page.tags}
    assert not re.search(r"url\(|@import", (tmp_path / "out" / REPORT).read_text())
    for score, value in found["scores"].items():
        assert score in page.parts["Scores"] and f"{value['score']:.2f}" in page.parts["Scores"]
    assert all(each in page.parts["Scores"] for each in found["differences"] if found["scores"])
    assert ("Worst" in page.parts) == bool(found["scores"])
    if published := found.get("published") if found["scores"] else None:
        assert all(model.removeprefix("Salesforce/") in page.parts["Scores"] for model in published["scores"])
    assert ("Confident mistakes" in page.parts) == (name in ("vqav2", "aokvqa-choices", "winoground"))


def test_what_a_retrieval_finds_first(tmp_path):
    rows = [{"image": CATS, "captions": ["a boat and two dogs"]},
            {"image": PICTURE, "captions": ["four cats, two dogs and a flower"]}]  # fmt: skip
    evaluate(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model="miniature-itm")
    page = Page(tmp_path / "out" / REPORT)
    assert "found: four cats, two dogs and a flower" in page.parts["Worst"]
    assert "reference: a boat and two dogs" in page.parts["Worst"] and "score 50" in page.parts["Worst"]


def test_texts_are_shown_and_not_obeyed(tmp_path, pipeline):
    rows = [{**row, "question": f"{row['question']} {ATTACK}", "type": ATTACK} for row in QUESTIONS]
    rows = write(tmp_path / "rows.jsonl", [{**rows[0], "answer": ATTACK, "image": f"{ATTACK.replace('/', '')}.png"},
                                           *rows[1:]])  # fmt: skip
    evaluate(rows, tmp_path / "out", model=pipeline)
    other = changed(tmp_path / "out", tmp_path / ATTACK.replace("/", ""), lambda _, row: row.update(caption=ATTACK))
    evaluate(rows, tmp_path / "out", model=pipeline, against=other)
    page = Page(tmp_path / "out" / REPORT)
    assert "script" not in page.tags
    assert f"before: {ATTACK}" in page.parts["Better"] and f"reference: {ATTACK}" in page.parts["Worst"]


@pytest.mark.parametrize("image", ["gone.png", "broken.png"])
def test_a_picture_that_cannot_be_shown_is_told(tmp_path, pipeline, image):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = write(tmp_path / "rows.jsonl", [{**QUESTIONS[0], "image": image}, QUESTIONS[1]])
    evaluate(rows, tmp_path / "out", model=pipeline)
    page = Page(tmp_path / "out" / REPORT)
    assert "the image could not be read" in page.parts["Worst"] and f"{image}: " in page.parts["Worst"]
    assert image not in page.parts["Confident mistakes"]
    assert "2 rows; 1 could not be read" in page.parts[""]


def test_nothing_is_downloaded_for_a_page(tmp_path, pipeline):
    rows = write(tmp_path / "rows.jsonl", [QUESTIONS[0]])
    evaluate(rows, tmp_path / "out", model=pipeline)
    write(rows, [{**QUESTIONS[0], "image": "http://127.0.0.1:9/a.png", "answer": "two"}])
    evaluating(rows, tmp_path / "out", model=pipeline, restart=True).scores()
    assert "not downloaded: http://127.0.0.1:9/a.png" in Page(tmp_path / "out" / REPORT).parts["Worst"]


def test_captions_have_no_mistakes_but_a_worst(tmp_path, pipeline):
    said = pipeline.caption([CATS, PICTURE])
    rows = [{"image": CATS, "captions": [said[0], "something else"]}, {"image": PICTURE, "captions": ["two words"]}]
    evaluate(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", model=pipeline)
    page = Page(tmp_path / "out" / REPORT)
    assert "CIDEr" in page.parts["Scores"] and "Confident mistakes" not in page.parts
    assert page.parts["Worst"].index(said[1]) < page.parts["Worst"].index(said[0])
    assert "SPICE: not computed" in page.parts["Scores"] and "By type" not in page.parts


def test_two_models_side_by_side(tmp_path, pipeline):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    evaluate(rows, tmp_path / "out", model=pipeline)
    said = ["five", "three", "yes"]
    other = changed(tmp_path / "out", tmp_path / "other", lambda number, row: row.update(caption=said[number]))
    found = evaluate(rows, tmp_path / "out", model=pipeline, against=other)
    page = Page(tmp_path / "out" / REPORT)
    beside = page.parts[f"Compared with {other}"]
    assert "2 rows changed, 1 better, 1 worse" in beside and f"p = {found['against']['p']:.3g}" in beside
    assert "before: fivenow: four" in page.parts["Better"] and "score 0, now 100" in page.parts["Better"]
    assert "before: threenow: two" in page.parts["Worse"] and "score 100, now 0" in page.parts["Worse"]
    assert "None." in page.parts["Changed, neither better nor worse"]
    evaluate(rows, tmp_path / "out", model=pipeline)
    assert not any(part.startswith("Compared with") for part in Page(tmp_path / "out" / REPORT).parts)


def test_confidence_that_is_not_kept(tmp_path, pipeline):
    evaluation = evaluating(write(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / "out", model=pipeline)
    evaluation.run.run()
    changed(tmp_path / "out", tmp_path / "unsure", lambda _, row: row.pop("score"))
    (tmp_path / "unsure" / ANSWERS).replace(tmp_path / "out" / ANSWERS)
    evaluation.scores()
    assert "was not kept" in Page(tmp_path / "out" / REPORT).parts["Confident mistakes"]


def test_few_of_many_rows_and_those_of_different_pictures(tmp_path, pipeline):
    wrong = [{**QUESTIONS[0], "answer": "none"}] * (2 * MOST_ROWS) + [{**QUESTIONS[1], "answer": "none"}]
    evaluate(write(tmp_path / "rows.jsonl", wrong), tmp_path / "out", model=pipeline)
    worst = Page(tmp_path / "out" / REPORT).parts["Worst"]
    assert worst.count("output: ") == MOST_ROWS and worst.count("how many dogs") == 1


def test_a_page_is_written_whole_or_not_at_all(tmp_path, pipeline, monkeypatch):
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    evaluate(rows, tmp_path / "out", model=pipeline)
    before = (tmp_path / "out" / REPORT).read_bytes()
    replace = disk.replace

    def full(moves):
        if moves[0][1].name == REPORT:
            raise OSError(28, "No space left on device")
        replace(moves)

    monkeypatch.setattr(disk, "replace", full)
    with pytest.raises(OSError, match="No space"):
        evaluate(rows, tmp_path / "out", model=pipeline, rule="lavis")
    assert (tmp_path / "out" / REPORT).read_bytes() == before
