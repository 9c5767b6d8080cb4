"""Whole collections on the command line, and through Python, with the bundled model on a few images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import blip2

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "cats.png": "a flower, two dogs and four cats",
    "flowers.png": "two dogs and two fish",
    "picture.png": "a boat and two dogs",
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three images and one that is damaged, in folders."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "10_sks dog").mkdir(parents=True)
    shutil.copy(EXAMPLES / "cats.png", folder)
    shutil.copy(EXAMPLES / "flowers.png", folder)
    shutil.copy(EXAMPLES / "picture.png", folder / "10_sks dog")
    (folder / "torn.png").write_bytes((EXAMPLES / "cats.png").read_bytes()[:5000])
    return folder


@pytest.fixture
def no_model(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("blip2.api.collect.load", load)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_sidecars(run, photos):
    found = run("caption", "photos", "--sidecar", ".txt", "--template", "{concept}: {caption}", "--prefix", "> ")
    assert found.exit_code == 1 and found.stdout == ""
    assert (photos / "10_sks dog" / "picture.txt").read_text() == f"> sks dog: {SAID['picture.png']}\n"
    assert (photos / "cats.txt").read_text() == f"> photos: {SAID['cats.png']}\n"
    assert not (photos / "torn.txt").exists()
    assert "3 done, 0 skipped, 1 failed" in found.stderr and "--retry-failed" in found.stderr
    assert found.stderr.count("torn.png") == 1


def test_what_a_run_wrote_is_not_passed_over_nor_done_anew_by_a_restart_alone(run, photos):
    (photos / "readme.md").write_text("x")
    command = ["caption", "photos", "--sidecar", ".txt", "--exclude", "torn.png", "--beams", 1]
    assert "skipped in folders: 1 other file (1 .md)" in run(*command).stderr
    assert "skipped in folders: 1 other file (1 .md)" in run(*command).stderr
    refused = run(*command, "--prefix", "sks, ")
    assert refused.exit_code == 1
    remedy = "another output, or add --restart and give --if-exists overwrite to start again\n"
    assert refused.stderr.endswith(remedy)
    again = run(*command, "--prefix", "sks, ", "--restart", "--if-exists", "overwrite")
    assert "3 done, 0 skipped" in again.stderr and (photos / "cats.txt").read_text().startswith("sks, ")


def test_captions_that_two_pictures_have_are_counted_and_answers_are_not(run, photos):
    content = (photos / "cats.png").read_bytes()
    (photos / "again.png").write_bytes(content)
    pictures = ["photos/cats.png", "photos/again.png", "-o", "out.jsonl", "--format", "jsonl"]
    assert "1 caption is the same as that of another image" in run("caption", *pictures).stderr
    answers = run("ask", *pictures, "-q", "is there a cat?", "--restart")
    assert "2 done" in answers.stderr and "another image" not in answers.stderr


@pytest.mark.parametrize(("flags", "remedy"), [
    ([], "the same command resumes"), (["--restart"], "the same command without --restart resumes"),
])  # fmt: skip
def test_what_goes_on_after_an_interrupt(run, photos, monkeypatch, flags, remedy):
    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("blip2.api.collect.CollectionRun.run", interrupted)
    found = run("caption", "photos", "--sidecar", ".txt", *flags)
    monkeypatch.undo()
    limited = run("caption", str(photos), "--sidecar", ".txt", "--limit", 1, "--beams", 1, *flags)
    assert f"stopped at --limit; without it{' and --restart' if flags else ''}, the same" in limited.stderr
    assert found.exit_code == 130 and found.stderr.endswith(f"stopped; finished results are kept, and {remedy}\n")


def test_the_same_command_loads_no_model_when_all_is_done(run, photos, monkeypatch, no_model):
    command = ["caption", "photos/cats.png", "-o", "all.jsonl", "--format", "jsonl"]
    with monkeypatch.context() as changed:
        changed.setattr("blip2.api.collect.load", blip2.load)
        assert run(*command).exit_code == 0
    before = Path("all.jsonl").read_bytes()
    assert [(row["caption"], row["model"], row["width"]) for row in rows("all.jsonl")] == [
        (SAID["cats.png"], "miniature", 350)
    ]
    found = run(*command, "--html", "review.html")
    assert found.exit_code == 0 and "1 in earlier runs" in found.stderr
    assert Path("all.jsonl").read_bytes() == before
    assert SAID["cats.png"] in Path("review.html").read_text()
    [thumbnail] = Path("review.files").iterdir()
    assert thumbnail.read_bytes().startswith(b"\xff\xd8")


def test_what_is_skipped_says_why(run, photos, no_model):
    (photos / "cats.txt").write_text("by hand")
    found = run("caption", "photos/cats.png", "--sidecar", ".txt")
    assert "0 done, 1 skipped" in found.stderr and "already have a text; --if-exists overwrite" in found.stderr


def test_a_dry_run_lists_and_writes_nothing(run, photos, no_model):
    (photos / "flowers.txt").write_text("by hand")
    before = sorted(photos.parent.rglob("*"))
    found = run("caption", "photos", "--sidecar", ".txt", "--dry-run")
    assert found.exit_code == 0
    assert found.stdout.splitlines() == [
        "to do\t10_sks dog/picture.png", "to do\tcats.png", "skipped\tflowers.png", "to do\ttorn.png",
    ]  # fmt: skip
    assert "3 to do, 1 skipped; nothing was written" in found.stderr
    assert sorted(photos.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["photos", "--prefix", "x"], 2, "--prefix needs results in files"),
        (["photos", "-o", "all.jsonl", "--json"], 2, "--json is for standard output"),
        (["photos", "-o", "all.jsonl", "--beams", "0"], 2, "--beams is 0"),
        (["photos", "-o", "all.jsonl", "--limit", "0"], 2, "--limit is 0"),
        (["photos", "-o", "all.jsonl", "--shard", "4/3"], 2, "--shard is 4/3"),
        (["photos", "-o", "all.jsonl", "--shard", "2/3", "--restart"], 2, "--restart in one of several parts"),
        (["photos", "-o", "all.jsonl", "--template", "{nobody}"], 2, "--template has {nobody}"),
        (["photos", "-o", "all.jsonl", "--replace", "a"], 2, "give OLD=NEW"),
        (["photos", "-o", "all.json"], 2, "--format coco"),
        (["photos", "-o", "all.jsonl", "--format", "nobody"], 2, "--format nobody"),
        (["photos", "-o", "all.jsonl", "--pick", "best"], 2, "--num-captions"),
        (["nowhere.parquet", "-o", "all.jsonl"], 1, "nowhere.parquet: no such file"),
        (["rows.jsonl", "-o", "rows.jsonl", "--if-exists", "overwrite"], 1, "is the source itself"),
        (["photos", "-o", "mine.jsonl"], 1, "exists, and was not made by this command"),
        (["-o", "all.jsonl"], 2, "Missing argument"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(run, photos, no_model, arguments, code, told):
    Path("rows.jsonl").write_text('{"image": "photos/cats.png"}\n')
    Path("mine.jsonl").write_text("mine")
    found = run("caption", *arguments)
    assert found.exit_code == code and told in found.stderr and found.stderr.count("\n") == 1
    assert not Path("all.jsonl").exists() and Path("mine.jsonl").read_text() == "mine"


def test_a_changed_command_stops_in_the_words_of_the_command_line(run, photos, monkeypatch):
    command = ["caption", "photos/cats.png", "-o", "all.jsonl"]
    assert run(*command).exit_code == 0
    monkeypatch.setattr("blip2.api.collect.load", None)
    found = run(*command, "--beams", "3", "--prompt", "there are", "--batch-size", "3")
    assert found.exit_code == 1
    assert '(--prompt was not given and is "there are"; --beams was 5 and is 3)' in found.stderr
    assert "--restart" in found.stderr and "batch" not in found.stderr


def test_a_model_that_cannot_be_loaded_blocks_no_other_command(run, photos):
    Path("broken").mkdir()
    command = ["caption", "photos/cats.png", "-o", "all.jsonl", "--format", "jsonl"]
    assert "broken" in run(*command, "--model", "broken").stderr
    assert run(*command, "--dry-run").exit_code == 0
    found = run(*command)
    assert found.exit_code == 0 and "1 done" in found.stderr
    assert "was started by another command" in run(*command, "--model", "broken").stderr


def test_a_disk_that_is_full_is_one_line(run, photos, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "photos/cats.txt")

    monkeypatch.setattr("blip2.collection.sinks.sidecar.write_all", full)
    found = run("caption", "photos", "--sidecar", ".txt")
    assert found.exit_code == 1 and "photos/cats.txt: cannot be written or read (No space left" in found.stderr
    assert "the same command resumes" in found.stderr and "should not happen" not in found.stderr


def test_json_lines_of_events(run, photos):
    found = run("caption", "photos", "-o", "all.parquet", "--log-json")
    events = [json.loads(line) for line in found.stderr.splitlines()]
    assert [event["event"] for event in events] == ["failed", "summary"]
    assert events[0]["key"] == "torn.png" and (events[1]["done"], events[1]["failed"]) == (3, 1)


def test_shards_of_an_array_of_slurm(run, photos, monkeypatch):
    for name, value in {"ID": 2, "MIN": 1, "MAX": 2, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    found = run("caption", "photos/cats.png", "-o", "all.jsonl")
    assert "part 2 of 2, from the SLURM array" in found.stderr and not Path("all.jsonl").exists()


def test_questions_for_each_picture(run, photos):
    asked = ["-q", "how many dogs are there?", "-q", "is there a cat?"]
    found = run("ask", "photos/cats.png", "photos/flowers.png", *asked, "-o", "answers.jsonl")
    assert found.exit_code == 0
    assert [(Path(row["file_name"]).name, row["question"], row["caption"]) for row in rows("answers.jsonl")] == [
        ("cats.png", asked[1], "two"), ("cats.png", asked[3], "yes"),
        ("flowers.png", asked[1], "two"), ("flowers.png", asked[3], "no"),
    ]  # fmt: skip
    assert "several rows per image" in run("ask", "photos", *asked, "--sidecar", ".txt").stderr


def test_questions_of_rows_and_a_question_that_changes(run, photos):
    lines = [
        {"image": "photos/cats.png", "question": "how many cats are there?", "caption": "no answer"},
        {"image": "photos/flowers.png", "question": "how many flowers are there?"},
        {"image": "photos/cats.png", "key": "third"},
    ]
    command = ["ask", "vqa.jsonl", "--question-column", "question", "--key-column", "row", "-o", "answers.jsonl"]
    Path("vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run(*command)
    assert found.exit_code == 1 and "there is no question in 'question'" in found.stderr
    assert [row["caption"] for row in rows("answers.jsonl")] == ["four", "two", ""]
    lines[0]["question"] = "how many dogs are there?"
    Path("vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "1 done" in run(*command).stderr
    assert [row["caption"] for row in rows("answers.jsonl")] == ["two", "two", ""]


def test_texts_that_fit(run, photos):
    texts = ["a boat and two dogs", "four cats"]
    found = run("match", "photos/10_sks dog", "-t", texts[1], "-t", texts[0], "-o", "labels.jsonl")
    assert found.exit_code == 0
    [row] = rows("labels.jsonl")
    assert row["caption"] == texts[0] and row["captions"] == texts and row["scores"] == sorted(row["scores"])[::-1]


def test_the_caption_that_fits_best_is_the_first(run, photos):
    command = ["caption", "photos/cats.png", "-n", "3", "-o", "all.jsonl", "--format", "jsonl"]
    assert run(*command, "--pick", "best").exit_code == 0
    [row] = rows("all.jsonl")
    assert len(row["scores"]) == 3 and row["scores"] == sorted(row["scores"])[::-1]
    assert row["caption"] == row["captions"][0]
    matched = blip2.load("miniature-itm").match("photos/cats.png", row["captions"]).itm_probability[0]
    assert row["scores"] == pytest.approx(matched.tolist(), abs=6e-5)  # four digits


def test_equal_files_are_seen_once(run, photos):
    shutil.copy(photos / "cats.png", photos / "10_sks dog" / "again.png")
    command = ["caption", "photos", "-o", "all.jsonl", "--format", "jsonl", "--template", "{name}: {caption}"]
    found = run(*command, "--dedupe", "--log-json")
    events = [json.loads(line) for line in found.stderr.splitlines()]
    assert (events[-1]["done"], events[-1]["copies"], events[-1]["repeated"]) == (4, 1, 0)
    assert [row["caption"] for row in rows("all.jsonl")] == [
        f"again: {SAID['cats.png']}", f"picture: {SAID['picture.png']}", f"cats: {SAID['cats.png']}",
        f"flowers: {SAID['flowers.png']}", "",
    ]  # fmt: skip
    assert "--dedupe was true and is not given" in run(*command).stderr
    found = run("ask", "photos/cats.png", "photos/10_sks dog/again.png", "-q", "how many cats are there?", "-q",
                "is there a boat?", "-o", "answers.jsonl", "--dedupe")  # fmt: skip
    assert "2 copies of other images, given the same result" in found.stderr
    assert [row["caption"] for row in rows("answers.jsonl")] == ["four", "no", "four", "no"]
    found = run("caption", "photos", "-o", "other.jsonl", "--dedupe", "--sample", "--beams", "1")
    assert found.exit_code == 2 and "give --seed, or leave out --dedupe" in found.stderr


def test_python(photos):
    seen = []
    blip = blip2.load()
    options = {"model": blip, "num_beams": 1, "max_chars": 12}
    summary = blip2.caption_collection(
        photos, "all.csv", on_results=lambda summary, results: seen.extend(results), html="page.html", **options
    )
    assert (summary.done, summary.failed) == (3, 1) and len(seen) == 4
    assert max(len(result.line) for result in seen) <= 12
    assert '"status": "failed"' in Path("page.html").read_text()
    assert blip2.caption_collection(photos, "all.csv", **options).before == 4
    with pytest.raises(blip2.Blip2Error, match="there is no option prefixx; did you mean prefix"):
        blip2.caption_collection(photos, "other.csv", model=blip, prefixx="a")
    with pytest.raises(blip2.Blip2Error, match="dtype is for loading a model"):
        blip2.caption_collection(photos, "other.csv", model=blip, dtype="float32")
    blip2.ask_collection(photos, "how many dogs are there?", "answers.jsonl", model=blip)
    assert [row["caption"] for row in rows("answers.jsonl")] == ["two", "two", "two", ""]


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for others")
def test_ctrl_c_keeps_what_was_done(photos):
    for number in range(2000):  # half a minute of work, so that it is not done before a busy machine sends the signal
        os.link(photos / "cats.png", photos / f"{number:04}.png")
    command = [sys.executable, "-m", "blip2", "caption", "photos", "-o", "all.jsonl", "--format", "jsonl"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    part = Path(".all.jsonl.blip2/units/000000.part")
    while not part.exists() or part.read_bytes().count(b"\n") < 5:
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    told = child.communicate()[1].decode()
    assert told.endswith("finished results are kept, and the same command resumes\n"), (child.returncode, told)
    assert child.returncode == 130
    assert not Path("all.jsonl").exists() and part.read_bytes().endswith(b"}\n")
