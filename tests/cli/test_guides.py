"""Guides that need more than tests/test_docs.py has: their commands run as they stand, and print what is shown.

That of alt texts is in test_alt.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.evaluate import written

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
EXAMPLES = {name: (ROOT / "examples" / f"{file}.png").read_bytes()
            for name, file in {"boat": "picture", "cats": "cats", "flowers": "flowers"}.items()}  # fmt: skip


def commands(guide):
    """Each with what is shown of its output, "" if nothing is."""
    for block in re.findall(r"```console\n(.*?)```", (GUIDES / guide).read_text("utf-8"), re.S):
        for shown in block.removeprefix("$ ").split("\n$ "):
            command, _, output = shown.strip("\n").partition("\n")
            yield command, output


@pytest.fixture
def follow(run, tmp_path, monkeypatch):
    """Do what a guide says; its results, in order. ``instead``: what is not on every machine."""
    monkeypatch.chdir(tmp_path)

    def follow_it(guide, instead=None):
        found = []
        for command, output in commands(guide):
            for there, here in (instead or {}).items():
                command = command.replace(there, here)
            program, *arguments = shlex.split(command)
            assert program == "blip2"
            done = run(*arguments)
            assert done.exit_code == 0, (command, done.stderr)
            assert done.stdout.strip("\n") == output or not output, command
            found.append(done)
        return found

    return follow_it


def drawn(folder, *names):
    for name in names:
        path = Path(folder, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(EXAMPLES[path.stem])


def rows(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_lora(follow, monkeypatch):
    drawn("img/10_sks dog", *EXAMPLES)
    Path("img/10_sks dog/flowers.txt").write_text("my own words\n")
    _dry, few, everything, anew, *tables = follow("lora.md")
    assert "1 done" in few.stderr and "stopped at --limit" in few.stderr
    assert "1 done, 1 skipped, 0 failed, 1 in earlier runs" in everything.stderr
    assert "3 done" in anew.stderr
    text = Path("img/10_sks dog/boat.txt").read_text()
    assert text == "photo of sks dog, a boat and two dogs\n"
    assert Path("review.html").exists() and "my own words" in Path("review.html").read_text()
    assert [re.search(r"\d+ done, \d+ skipped", done.stderr)[0] for done in tables] == ["0 done, 3 skipped"] * 3
    meta = json.loads(Path("meta.json").read_text())
    assert meta[str(Path("img/10_sks dog/boat.png").absolute())]["caption"] == text.strip()
    assert len(rows("rows.jsonl")) == 3
    assert rows("img/metadata.jsonl")[0] == {"file_name": "10_sks dog/boat.png", "text": text.strip()}


@pytest.mark.skipif(find_spec("webdataset") is None, reason="needs blip2[data]")
def test_shards(follow):
    from pyarrow import Table, parquet

    Path("shards").mkdir()
    for number, name in enumerate(EXAMPLES):
        with tarfile.open(f"shards/{number:05}.tar", "w") as tar:
            for member, content in {"png": EXAMPLES[name], "txt": b"buy this now"}.items():
                told = tarfile.TarInfo(f"{number:05}0000.{member}")
                told.size = len(content)
                tar.addfile(told, io.BytesIO(content))
    pictures = [{"image": {"bytes": content, "path": f"{name}.png"}} for name, content in EXAMPLES.items()]
    parquet.write_table(Table.from_pylist(pictures), "rows.parquet")

    done = follow("shards.md", {"--devices 0,1": "--devices cpu"})
    trial, whole, devices, first, second, again, _ = (found.stderr for found in done)
    assert "2 done" in trial and "3 done" in whole and "part" in first
    assert all("3 in earlier runs" in told for told in (devices, again)) and "3 in earlier runs" not in second
    assert [(row["caption_original"], row["caption"]) for row in rows("trial.jsonl")] == [
        ("buy this now", "a boat and two dogs"), ("buy this now", "a flower, two dogs and four cats"),
    ]  # fmt: skip
    files = sorted(path.name for path in Path("captioned").iterdir() if path.is_file())
    assert files == [f"{number:05}{end}" for number in range(3) for end in (".parquet", ".tar", "_stats.json")]
    for name in files:
        assert Path("captioned", name).read_bytes() == Path("parts", name).read_bytes()
    with tarfile.open("captioned/00000.tar") as tar:
        assert tar.extractfile("000000000.txt").read() == b"a boat and two dogs"
        assert tar.extractfile("000000000.orig.txt").read() == b"buy this now"
    assert parquet.read_table("captions.parquet")["caption"][0].as_py() == "a boat and two dogs"


@pytest.mark.skipif(find_spec("defusedxml") is None, reason="needs blip2[data]")
def test_a_photo_library(follow):
    drawn("library", "2024/boat", "2024/cats", "2025/flowers")
    before = {path: path.read_bytes() for path in Path("library").rglob("*.png")}
    Path("labels.txt").write_text("boat\ncat\nflower\n")
    *_, described, again, index, _found, _like, _copies, _labels, _asked = follow("photo-library.md")
    assert "3 done" in described.stderr and "3 in earlier runs" in again.stderr and "3 new" in index.stderr
    assert "a flower, two dogs and four cats" in Path("library/2024/cats.png.xmp").read_text("utf-8")
    assert {path: path.read_bytes() for path in before} == before
    assert "boat.png" in Path("found.html").read_text()
    assert [len(row["captions"]) for row in rows("labels.jsonl")] == [2, 2, 2]
    with open("dogs.csv", encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["yes"] * 3


def test_training_a_lora(follow):
    """Its recipe with the bundled model, few rows and few steps."""
    drawn(".", *EXAMPLES)
    lines = [{"image": f"{name}.png", "caption": f"this is the picture of a {name}"} for name in EXAMPLES]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [recipe] = re.findall(r"```toml\n(.*?)```", (GUIDES / "training-lora.md").read_text("utf-8"), re.S)
    few = {"Salesforce/blip2-opt-2.7b": "miniature", "steps = 1000": "steps = 25", "batch_size = 16": "batch_size = 3",
           "peak_lr = 2e-4": "peak_lr = 3e-3", "warmup_steps = 50": "warmup_steps = 3"}  # fmt: skip
    for there, here in few.items():
        assert there in recipe
        recipe = recipe.replace(there, here)
    Path("recipe.toml").write_text(recipe)
    instead = {"Salesforce/blip2-opt-2.7b": "miniature", "photo.jpg": "cats.png"}
    before, heart, trained, _, caption, _ = follow("training-lora.md", instead)
    assert "adapters: " in before.stdout and "cats.png: caption: " in before.stdout
    assert heart.stdout.startswith("memorised: the loss of 3 rows")
    assert trained.stdout.strip().endswith("my-lora")
    assert "this is the picture of a cats" in caption.stdout
    assert Path("merged/config.json").exists() and Path("batch.html").exists() and Path("curves.svg").exists()


def test_training_at_scale(run, tmp_path, monkeypatch):
    """All that its recipes say at once, with the bundled model, in few steps."""
    monkeypatch.chdir(tmp_path)
    drawn(".", *EXAMPLES)
    lines = [{"image": f"{name}.png", "caption": f"this is the picture of a {name}"} for name in EXAMPLES]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    blocks = re.findall(r"```toml\n(.*?)```", (GUIDES / "training-at-scale.md").read_text("utf-8"), re.S)
    said = "".join(block for block in blocks if not block.startswith("[data]"))  # another test's
    keys, _, tables = said.replace('to = ["tensorboard"]', "to = []").replace("= 500", "= 2").partition("[optim]")
    optim, *others = tables.replace("[optim]", "").partition("[track]")
    sample = "sample_every = 2"
    recipe = f"""
        stage = 2\nstart = "miniature"\nout = "out"\nlog_every = 1\n{keys}\n{sample}
        [data]\nrows = "rows.jsonl"\n[evaluation]\nrows = "rows.jsonl"
        [optim]\nsteps = 3\nbatch_size = 3\nwarmup_steps = 1\n{optim.replace(sample, "")}
        {"".join(others)}
    """
    Path("recipe.toml").write_text(recipe)
    done = run("train", "recipe.toml")
    assert done.exit_code == 0, done.stderr
    assert "mfu is relative to" in done.stderr and "tokens/s" in done.stderr
    assert [path.name for path in sorted(Path("out/samples").iterdir())] == ["0000002.html", "0000003.html"]
    for name in re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?", (GUIDES / "training-at-scale.md").read_text("utf-8"), re.M):
        assert all(not each or each in rows("out/log.jsonl")[0] for each in name)


def test_fine_tuning(follow):
    """The recipe for questions with the bundled model, few rows and few steps."""
    drawn(".", *EXAMPLES)
    recipe = (ROOT / "examples" / "recipes" / "vqa.toml").read_text("utf-8")
    few = {'"runs/stage2"': '"miniature"', '"runs/stage1"': '"miniature-itm"', "image_size = 480": "image_size = 140",
           "steps = 4000": "steps = 4", "batch_size = 16": "batch_size = 3", "accumulate = 4": "accumulate = 2",
           "warmup_steps = 200": "warmup_steps = 2"}  # fmt: skip
    for there, here in few.items():
        assert there in recipe
        recipe = recipe.replace(there, here)
    Path("examples/recipes/data").mkdir(parents=True)
    Path("examples/recipes/vqa.toml").write_text(recipe)
    lines = [{"image": f"../../../{name}.png", "question": f"is there a {name}?", "answers": {"yes": 9, "no": 1}}
             for name in EXAMPLES]  # fmt: skip
    for name in ("train", "held_out"):
        Path(f"examples/recipes/data/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before, heart, trained, answer = follow("fine-tuning.md", {"photo.jpg": "cats.png"})
    assert "image encoder: 2.8" in before.stdout and "Question: is there a cats? Answer:" in before.stdout
    assert "memorised" in heart.stdout and trained.stdout.strip().endswith("runs/vqa")
    assert answer.stdout.strip()


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="needs blip2[data]")
def test_an_evaluation(follow):
    for write in (written.vqav2, written.coco_list, written.flickr_list, written.winoground):
        write(Path("datasets"))
    asked = [{"image": "cats.png", "question": "how many cats are there?", "answer": "four"}]
    drawn(".", "cats")
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    names, first, whole, again, captions, worded, found, pairs, int4, mine, *firm = follow("evaluate.md")
    assert "aokvqa-choices" in names.stdout and "12 rows" in first.stdout and "24 rows" in whole.stdout
    assert "differs: the rule is lmms-eval, not official" in again.stdout and "24 in earlier runs" in again.stderr
    assert "num_beams is 3, not 5" in captions.stdout and "image R@10" in found.stdout and "group" in pairs.stdout
    assert "compared with vqa" in int4.stdout and "quantize is int4" in int4.stdout and "accuracy" in mine.stdout
    assert "accuracy" in worded.stdout and Path("vqa/report.html").exists()
    assert [each.stdout.splitlines()[0] for each in firm] == ["robustness: questions.jsonl: miniature"] * 2
    assert Path("evaluations/robustness-miniature/report.html").exists() and Path("firm/pictures").is_dir()
    assert Path("vqa/v2_OpenEnded_mscoco_val2014_blip2_results.json").exists()
    assert Path("evaluations/vqav2-miniature/scores.json").exists()
    told = re.search(r"It needs testdev_balanced_questions.json", (GUIDES / "evaluate.md").read_text("utf-8"))
    assert told is not None
