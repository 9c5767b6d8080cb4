"""``blip2 evaluate``: the table, what is missing, and the exit code."""

import json

import pytest

from blip2.cli.evaluate import PROTOCOLS as PROTOCOLS_OF_CLI
from blip2.cli.evaluate import RULES, table
from blip2.evaluate import BENCHMARKS, PROTOCOLS
from blip2.scores import VQA_RULES
from tests.evaluate import written


@pytest.fixture
def rows(tmp_path, pictures):
    path = tmp_path / "rows.jsonl"
    asked = [{"image": picture, "question": "how many?", "answer": "two", "type": "count"} for picture in pictures[:2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


def test_a_table_by_type(run, opt_model, rows, tmp_path):
    result = run("evaluate", str(rows), "-o", str(tmp_path / "out"), "--model", str(opt_model))
    assert result.exit_code == 0, result.stderr
    heading, accuracy, count = result.stdout.splitlines()
    assert heading == "2 rows"
    assert accuracy.startswith("accuracy ") and count.startswith("count ") and count.endswith("2 rows")
    beside = ["--against", str(tmp_path / "out")]
    again = run("evaluate", str(rows), "-o", str(tmp_path / "other"), "--model", str(opt_model), *beside)
    assert "0 rows changed, 0 better, 0 worse, p = 1" in again.stdout


def test_what_is_not_answered_yet_has_no_scores(run, opt_model, rows, tmp_path):
    command = ["evaluate", str(rows), "-o", str(tmp_path / "out"), "--model", str(opt_model)]
    result = run(*command, "--limit", "1")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1 rows have no answer yet" in result.stderr
    assert run(*command).stdout.startswith("2 rows\n")


def test_a_dry_run_writes_nothing(run, opt_model, rows, tmp_path):
    result = run("evaluate", str(rows), "-o", str(tmp_path / "out"), "--model", str(opt_model), "--dry-run")
    assert result.exit_code == 0
    assert not list((tmp_path / "out").glob("*.json*"))


def test_rows_that_cannot_be_used(run, tmp_path):
    result = run("evaluate", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


def test_the_rules_are_those_that_there_are():
    assert tuple(VQA_RULES) == RULES


def test_a_benchmark_with_its_published_scores_beside(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written.vqav2(tmp_path / "data")
    result = run("evaluate", "vqav2", "--data", "data", "--first", "6")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "VQAv2, validation, zero-shot: miniature, protocol paper"
    assert lines[1] == "6 rows" and lines[2].startswith("accuracy ")
    assert "published: BLIP-2 paper, table 2" in lines
    assert any(line.split() == ["blip2-opt-2.7b", "accuracy", "53.50"] for line in lines)
    assert "differs: 6 of its 214,354 rows" in lines
    assert lines[-1] == "for the server: v2_OpenEnded_mscoco_val2014_blip2_results.json"
    assert (tmp_path / "evaluations" / "vqav2-miniature" / "scores.json").exists()


def test_the_published_score_of_the_same_model():
    found = {
        "rows": 2, "failed": 0, "types": {}, "title": "a", "protocol": "paper", "model": "one",
        "scores": {"accuracy": {"score": 50.0, "low": 1.0, "high": 99.0}}, "differences": [],
        "published": {"source": "a paper", "scores": {"one": {"accuracy": 53.5}}},
    }  # fmt: skip
    assert table(found).splitlines()[2:] == [
        "accuracy              50.00  (1.00 to 99.00)  published 53.50", "published: a paper"
    ]


def test_a_retrieval_shows_its_first_pass(run, tmp_path):
    written.flickr_karpathy(tmp_path)
    command = ["evaluate", "flickr30k-retrieval", "--data", str(tmp_path), "-o", str(tmp_path / "out"), "--first", "4"]
    assert "seen" not in run(*command, "--dry-run").stderr
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert "4 of 4 images encoded" in result.stderr and "text R@1" in result.stdout


def test_the_benchmarks_are_listed(run):
    lines = run("evaluate", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*BENCHMARKS, "robustness"]
    assert tuple(PROTOCOLS) == PROTOCOLS_OF_CLI


def test_a_benchmark_that_is_not_there(run, tmp_path):
    result = run("evaluate", "gqa", "--data", str(tmp_path))
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "--data" in result.stderr and "lmms-lab/GQA" in result.stderr


def test_robustness(run, opt_model, rows, tmp_path):
    command = ["evaluate", "robustness", "-o", str(tmp_path / "out"), "--model", str(opt_model)]
    result = run(*command, "--data", str(rows))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"robustness: rows.jsonl: {opt_model}" and lines[1] == "2 rows"
    assert any(line.startswith("changed, EXIF rotation ") and " 0.00 " in line for line in lines)
    assert lines[-1].startswith("compared with the rows as they are: ")
    without = run(*command)
    assert without.exit_code == 2 and "--data" in without.stderr and without.stderr.count("\n") == 1
