"""Result files beside the programs that read them."""

from __future__ import annotations

import json
import re

import pytest

import blip2
from blip2.evaluate import evaluate
from tests.evaluate import written


@pytest.fixture(scope="module")
def pipeline():
    return blip2.load()


def test_the_official_loader_takes_the_captions(tmp_path, pipeline) -> None:
    """Needs ``pip install --no-deps pycocotools``."""
    coco = pytest.importorskip("pycocotools.coco")
    written.karpathy(tmp_path / "data")
    report = evaluate("coco", tmp_path / "out", data=tmp_path / "data", model=pipeline)
    images = [{"id": each.id} for each in written.drawn()]
    said = [{"image_id": each.id, "id": at, "caption": each.captions[0]} for at, each in enumerate(written.drawn())]
    written.text(tmp_path / "annotations.json", {"images": images, "annotations": said, "info": {}})
    loaded = coco.COCO(str(tmp_path / "annotations.json")).loadRes(str(tmp_path / "out" / report["results"]))
    assert sorted(loaded.getImgIds()) == sorted(each.id for each in written.drawn())


def test_the_rules_of_the_server_of_vqa(tmp_path, pipeline) -> None:
    """Of GT-Vision-Lab/VQA's loadRes: a list, and the ids of the questions, each of them and no other."""
    written.vqav2(tmp_path / "data")
    report = evaluate("vqav2", tmp_path / "out", data=tmp_path / "data", model=pipeline)
    content = json.loads((tmp_path / "out" / report["results"]).read_text())
    asked = json.loads((tmp_path / "data" / "vqa" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    assert isinstance(content, list)
    assert {row["question_id"] for row in content} == {row["question_id"] for row in asked["questions"]}
    assert all(type(row["question_id"]) is int and type(row["answer"]) is str for row in content)


def test_questions_of_a_test_are_answered_for_the_server(tmp_path, pipeline) -> None:
    written.test_dev(tmp_path / "data")
    report = evaluate("vqav2-test-dev", tmp_path / "out", data=tmp_path / "data", model=pipeline)
    assert report["scores"] == {} and report["rows"] == 24
    content = json.loads((tmp_path / "out" / report["results"]).read_text())
    assert len(content) == 24 and all(row["answer"] for row in content)


def test_questions_are_cleaned_as_the_authors_clean_them(tmp_path, pipeline) -> None:
    path = tmp_path / "data" / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    written.test_dev(tmp_path / "data")
    found = json.loads(path.read_text())
    found["questions"][0]["question"] = 'What is "IT"; (two words)?'
    path.write_text(json.dumps(found))
    evaluate("vqav2-test-dev", tmp_path / "out", data=tmp_path / "data", model=pipeline)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert "what is it two words?" in [row["question"] for row in rows]
    assert not any(re.search(r'[A-Z"();]', row["question"]) for row in rows)
