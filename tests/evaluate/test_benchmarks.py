"""Named benchmarks, each in each form that its files have: the same rows, the same scores, the file for the server."""

from __future__ import annotations

import json

import pytest

import blip2
from blip2.evaluate import ANSWERS, BENCHMARKS, SCORES, evaluate
from blip2.evaluate.benchmark import MATCHING
from tests.evaluate.written import LAYOUTS, NUMBER, drawn, needs_drawings

pytest.importorskip("pyarrow")
ALL = [(name, form) for name, forms in LAYOUTS.items() for form in forms]


@pytest.fixture(scope="module")
def models():
    return {False: blip2.load(), True: blip2.load("miniature-itm")}


@pytest.fixture(scope="module")
def found(models, tmp_path_factory):
    """The report of a benchmark in a form, and its folder; each is made once."""
    made = {}

    def of(name, form):
        if (name, form) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{form}")
            LAYOUTS[name][form](folder / "data")
            model = models[BENCHMARKS[name].task in MATCHING]
            made[name, form] = evaluate(name, folder / "out", data=folder / "data", model=model), folder / "out"
        return made[name, form]

    return of


def test_every_benchmark_is_written_here():
    assert LAYOUTS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize(("name", "form"), ALL)
def test_every_form_has_the_same_scores(found, name, form):
    report, folder = found(name, form)
    benchmark = BENCHMARKS[name]
    first, _ = found(name, "official")
    by_form = {"mirror": {"domain CIDEr"}}.get(form, set())  # the mirror of NoCaps knows no domains
    expected = {each: score["score"] for each, score in first["scores"].items()
                if not any(each.endswith(end) for end in by_form)}  # fmt: skip
    assert {each: score["score"] for each, score in report["scores"].items()} == pytest.approx(expected)
    assert bool(report["scores"]) == benchmark.is_scored
    assert report["failed"] == 0 and report["benchmark"] == name
    assert report["differences"][0] == f"{report['rows']} of its {benchmark.rows:,} rows"
    assert json.loads((folder / SCORES).read_text()) == report
    if benchmark.published:
        assert report["published"]["source"] == benchmark.published["paper"].source
        assert any(each.startswith("the model is miniature") for each in report["differences"])
    assert ("these files do not have the domains" in report["differences"]) == ((name, form) == ("nocaps", "mirror"))


@needs_drawings
def test_what_the_miniature_knows_is_right(found):
    assert found("vqav2", "official")[0]["scores"]["accuracy"]["score"] > 60
    assert found("gqa", "official")[0]["scores"]["accuracy"]["score"] > 60
    assert found("coco-retrieval", "official")[0]["scores"]["text R@5"]["score"] > 60
    assert found("winoground", "official")[0]["scores"]["group"]["score"] > 60


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in ALL if BENCHMARKS[name].server])
def test_the_file_for_the_server_has_every_id_once(found, name, form):
    report, folder = found(name, form)
    content = json.loads((folder / report["results"]).read_text())
    questions = {number for each in drawn() for number, _, _ in each.asked()}
    match BENCHMARKS[name].server:
        case "coco":
            assert [*content[0]] == ["image_id", "caption"]
            ids = set(range(NUMBER)) if name == "nocaps" else {each.id for each in drawn()}
            assert {row["image_id"] for row in content} == ids and len(content) == NUMBER
        case "vqa":
            assert [*content[0]] == ["question_id", "answer"]
            assert {row["question_id"] for row in content} == questions and len(content) == len(questions)
        case "gqa":
            assert {row["questionId"] for row in content} == {str(number) for number in questions}
            assert all(isinstance(row["prediction"], str) for row in content)
        case "aokvqa":
            assert content.keys() == {f"q{each.id}" for each in drawn()}
            [kind] = {key for row in content.values() for key in row}
            assert kind == ("multiple_choice" if name == "aokvqa-choices" else "direct_answer")


def test_domains_have_a_score_of_their_own(found):
    report, _ = found("nocaps", "official")
    domains = [f"{domain}-domain CIDEr" for domain in ("in", "near", "out")]
    assert [report["scores"][domain]["rows"] for domain in domains] == [4, 4, 4]
    assert report["types"] == {}


def test_types_of_questions(found):
    assert found("gqa", "official")[0]["types"].keys() == {"binary", "open"}
    assert found("vqav2", "official")[0]["types"].keys() <= {"number", "other"}


def test_difficult_questions_are_asked_and_not_counted(found):
    report, folder = found("aokvqa", "official")
    assert report["rows"] == NUMBER
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    counted = [row for row in rows if not row.get("unscored")]
    assert len(counted) == NUMBER - 3
    said = {row["key"]: row["caption"] for row in map(json.loads, (folder / ANSWERS).read_text().splitlines())}
    each = [min(1, row["answers"].count(said[f"{at:09}"]) / 3) for at, row in enumerate(rows) if row in counted]
    assert report["scores"]["accuracy"]["score"] == pytest.approx(100 * sum(each) / len(each))


def test_the_questions_of_a_picture_stand_side_by_side(found):
    _, folder = found("vqav2", "official")
    images = [json.loads(line)["image"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    runs = [image for at, image in enumerate(images) if at == 0 or images[at - 1] != image]
    assert len(runs) == len(set(images)) == NUMBER


@needs_drawings
def test_answers_of_visual_genome_are_compared_as_the_authors_do(found):
    """They are sentences: "Two."."""
    scores = found("vg-qa", "official")[0]["scores"]
    assert scores["accuracy"]["score"] > 60 and scores["accuracy, rule official"]["score"] == 0


def test_the_published_settings_are_used(found, models, tmp_path):
    report, folder = found("vqav2", "official")
    assert report["settings"] == {"prompt": "", "image_size": 224, "num_beams": 5, "max_new_tokens": 10,
                                  "min_new_tokens": 1, "length_penalty": -1.0}  # fmt: skip
    data = folder.parent / "data"
    options = {"data": data, "model": models[False], "protocol": "lavis", "num_beams": 1, "rule": "all-ten"}
    other = evaluate("vqav2", tmp_path / "out", **options)
    assert other["settings"]["prompt"] == "Question: {} Short answer:"
    assert "num_beams is 1, not 5" in other["differences"]
    assert "the rule is all-ten, not lavis" in other["differences"]
    captions, _ = found("coco", "official")
    assert captions["settings"]["prompt"] == "a photo of" and captions["settings"]["min_new_tokens"] == 4


def test_a_question_prompt_is_the_prompt_of_a_benchmark_that_asks(models, tmp_path):
    LAYOUTS["vqav2"]["official"](tmp_path / "data")
    one, other = (
        evaluate("vqav2", tmp_path / name, data=tmp_path / "data", model=models[False], first=4, **{name: "Q: {} A:"})
        for name in ("prompt", "question_prompt")
    )
    assert one == other and "the prompt is 'Q: {} A:', not ''" in one["differences"]
