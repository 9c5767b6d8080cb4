"""``blip2 evaluate``: the table, what is missing, and the exit code."""

import json

import pytest

from blip2.cli.evaluate import RULES
from blip2.scores import VQA_RULES


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
