"""What is missing, broken or ambiguous is told in one line, with what to do, before a model is loaded."""

from __future__ import annotations

import json

import pytest

from blip2.errors import Blip2Error, CollectionError, OptionError
from blip2.evaluate import begun, evaluate
from tests.evaluate import written
from tests.evaluate.written import LAYOUTS, needs_drawings

pytest.importorskip("pyarrow")


def refused(name, data, out, **options):
    with pytest.raises(Blip2Error) as caught:
        begun(name, data, out, options)
    message = str(caught.value)
    assert "\n" not in message
    assert not (out / "answers.jsonl").exists()
    return message


def test_what_is_missing_is_named_with_where_it_is_had(tmp_path):
    message = refused("vqav2", tmp_path, tmp_path / "out")
    for part in ("v2_OpenEnded_mscoco_val2014_questions.json", "visualqa.org", "6.2 GB", "lmms-lab/VQAv2"):
        assert part in message
    assert "no such folder" in refused("vqav2", tmp_path / "gone", tmp_path / "out")


def test_pictures_that_are_missing(tmp_path):
    written.vqav2(tmp_path)
    pictures = sorted((tmp_path / "val2014").iterdir())
    pictures[0].unlink()
    report = evaluate("vqav2", tmp_path / "out", data=tmp_path)
    assert any("left out: its image does not exist" in each for each in report["differences"])
    for path in pictures[1:]:
        path.unlink()
    message = refused("vqav2", tmp_path, tmp_path / "other")
    assert "has none of the images" in message and "val2014.zip" in message


def test_half_of_the_files(tmp_path):
    written.vqav2(tmp_path)
    (tmp_path / "vqa" / "v2_mscoco_val2014_annotations.json").unlink()
    assert "does not have the files of this benchmark" in refused("vqav2", tmp_path, tmp_path / "out")


def test_pictures_of_one_name_are_those_near_the_file(tmp_path):
    """Visual Genome's are in GQA under the same names, COCO's in other data sets."""
    written.flickr_list(tmp_path)
    written.pictures(tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.write_bytes(b"no picture")
    assert evaluate("flickr30k", tmp_path / "out", data=tmp_path, first=2)["failed"] == 0
    written.pictures(tmp_path / "flickr30k" / "more")
    assert "several images have its name" in refused("flickr30k", tmp_path, tmp_path / "again")


@pytest.mark.parametrize("name", ["winoground", "okvqa", "gqa"])
def test_folders_that_are_named_from_here(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for form in LAYOUTS[name]:
        LAYOUTS[name][form](tmp_path / form)
        assert evaluate(name, f"out-{form}", data=form, first=2)["failed"] == 0


def test_several_copies(tmp_path):
    written.gqa(tmp_path / "one")
    written.gqa(tmp_path / "two")
    assert "both match" in refused("gqa", tmp_path, tmp_path / "out")
    assert begun("gqa", tmp_path / "one", tmp_path / "out", {}).num_missing == 24


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("testdev_balanced_questions.json", "{", "testdev_balanced_questions.json"),
        ("testdev_balanced_questions.json", "", "is empty"),
        ("testdev_balanced_questions.json", "{}", "gives no rows"),
        ("testdev_balanced_questions.json", '{"1": {"imageId": "n1"}}', "question"),
        ("testdev_balanced_questions.json", '{"1": 1}', "has to be an object"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, told):
    (tmp_path / file).write_text(content)
    (tmp_path / "n1.jpg").write_bytes(written.drawn()[0].content)
    assert told in refused("gqa", tmp_path, tmp_path / "out")


def test_a_broken_parquet_file(tmp_path):
    path = tmp_path / "VQAv2" / "validation-0.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1 and no more")
    assert "validation-0.parquet: cannot be read" in refused("vqav2", tmp_path, tmp_path / "out")


def test_a_mirror_with_paths_in_the_place_of_pictures(tmp_path):
    row = {"question_id": 1, "question": "what?", "answers": ["a"] * 10}
    rows = [{**row, "image": {"bytes": None, "path": "a.png"}}, {**row, "image": written.drawn()[0].cell}]
    written.parquet(tmp_path / "VQAv2" / "validation-0.parquet", rows)
    assert "has a path instead of an image" in refused("vqav2", tmp_path, tmp_path / "out")


def test_choices_of_which_none_is_right(tmp_path):
    written.aokvqa(tmp_path)
    path = tmp_path / "aokvqa_v1p0_val.json"
    rows = json.loads(path.read_text())
    rows[0]["correct_choice_idx"] = 9
    path.write_text(json.dumps(rows))
    assert "no choices with the right one" in refused("aokvqa-choices", tmp_path, tmp_path / "out")


def test_ids_that_a_server_would_not_know(tmp_path):
    written.coco_list(tmp_path)
    path = tmp_path / "coco" / "annotations" / "coco_karpathy_test.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "image_id": "one"} for row in rows]))
    with pytest.raises(CollectionError, match="'one', but it has to be a number"):
        evaluate("coco", tmp_path / "out", data=tmp_path)
    path.write_text(json.dumps([{**row, "image_id": 7} for row in rows]))
    with pytest.raises(CollectionError, match="has the id 7, like another row"):
        evaluate("coco", tmp_path / "other", data=tmp_path)


def test_pictures_of_winoground_that_are_not_unpacked(tmp_path):
    written.winoground(tmp_path)
    next((tmp_path / "winoground" / "images").glob("ex_0*")).unlink()
    assert "images.zip" in refused("winoground", tmp_path, tmp_path / "out")


def test_options_that_do_not_fit(tmp_path):
    written.vqav2(tmp_path)
    out = tmp_path / "out"
    assert "did you mean vqav2" in refused("vqa2", None, out)
    assert "is for a benchmark" in refused("rows.jsonl", tmp_path, out)
    assert "is for a benchmark" in refused("rows.jsonl", None, out, first=3)
    assert "it may be paper, lavis" in refused("vqav2", tmp_path, out, protocol="mine")
    assert "it may be official" in refused("vqav2", tmp_path, out, rule="mine")
    for prompt in ("Answer:", "{} or {}?"):
        assert "once, where the question goes" in refused("vqav2", tmp_path, out, prompt=prompt)
        assert "once, where the question goes" in refused("vqav2", tmp_path, out, question_prompt=prompt)
    assert "leave one out" in refused("vqav2", tmp_path, out, prompt="{}", question_prompt="{}")
    assert "coco has none" in refused("coco", tmp_path, out, question_prompt="{}")
    assert "give 1 or more" in refused("vqav2", tmp_path, out, first=0)
    assert "needs a generative model" in refused("vqav2", tmp_path, out, model="miniature-itm")
    assert "needs a matching model" in refused("coco-retrieval", tmp_path, out, model="miniature")
    assert "no such folder" in refused("vqav2", tmp_path, out, model=str(tmp_path / "gone"))
    assert "no option num_beam" in refused("vqav2", tmp_path, out, num_beam=2)
    assert "has no effect with choices" in _choices(tmp_path)


def _choices(folder):
    written.aokvqa(folder)
    return refused("aokvqa-choices", folder, folder / "choices", num_beams=2)


def test_a_folder_of_another_benchmark(tmp_path):
    written.vqav2(tmp_path / "data")
    written.okvqa(tmp_path / "data")
    evaluate("vqav2", tmp_path / "out", data=tmp_path / "data")
    with pytest.raises(CollectionError, match="has an evaluation of vqav2"):
        evaluate("okvqa", tmp_path / "out", data=tmp_path / "data")
    (tmp_path / "out" / "benchmark.json").write_text("not JSON")
    with pytest.raises(CollectionError, match=r"benchmark\.json: cannot be read"):
        evaluate("vqav2", tmp_path / "out", data=tmp_path / "data")


@needs_drawings
@pytest.mark.parametrize("name", ["vqav2", "coco", "coco-retrieval", "winoground"])
def test_a_picture_that_cannot_be_read_counts_as_wrong(tmp_path, name):
    LAYOUTS[name]["official"](tmp_path / "data")
    whole = evaluate(name, tmp_path / "whole", data=tmp_path / "data")
    pictures = sorted((tmp_path / "data").rglob("*.*g"))
    pictures[0].write_bytes(b"no picture")
    report = evaluate(name, tmp_path / "out", data=tmp_path / "data")
    assert report["failed"] >= 1 and report["rows"] == whole["rows"]
    first = next(iter(report["scores"]))
    assert report["scores"][first]["score"] < whole["scores"][first]["score"]


def test_against_is_for_answers(tmp_path):
    written.winoground(tmp_path)
    evaluate("winoground", tmp_path / "out", data=tmp_path)
    with pytest.raises(OptionError, match="a matching model"):
        evaluate("winoground", tmp_path / "out", data=tmp_path, against=tmp_path / "out")
    written.test_dev(tmp_path)
    evaluate("vqav2-test-dev", tmp_path / "test", data=tmp_path)
    with pytest.raises(OptionError, match="are not published"):
        evaluate("vqav2-test-dev", tmp_path / "test", data=tmp_path, against=tmp_path / "test")
