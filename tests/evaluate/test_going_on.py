"""Evaluations that are stopped, killed, divided, or given other batches: the same files at the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import blip2
from blip2.evaluate import ANSWERS, begun, evaluate
from blip2.tasks.see import ImageFrontend
from tests.evaluate.killed import OPTIONS
from tests.evaluate.written import LAYOUTS

ROOT = Path(__file__).parents[2]
KILLED = {  # a benchmark of each task, and when it is killed
    "vqav2": ["3 results", "6 results"],
    "coco": ["5 results"],
    "aokvqa-choices": ["3 results", "6 results"],
    "coco-retrieval": ["4 pictures", "3 results"],
    "winoground": ["5 results"],
}
QUICK = ("vqav2",)


def content(folder: Path) -> dict[str, str]:
    names = [ANSWERS, "scores.json", *(path.name for path in folder.glob("*results.json"))]
    return {name: (folder / name).read_text() for name in names}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KILLED]
)
def test_killed_and_begun_again(tmp_path, name):
    LAYOUTS[name]["official"](tmp_path / "data")
    evaluate(name, tmp_path / "whole", data=tmp_path / "data", **OPTIONS)
    for when in KILLED[name]:
        command = [sys.executable, "-m", "tests.evaluate.killed", name, str(tmp_path / "data"), str(tmp_path / "out")]
        done = subprocess.run([*command, when], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out" / ANSWERS).exists()
    evaluate(name, tmp_path / "out", data=tmp_path / "data", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_by_limits_and_in_parts(tmp_path):
    LAYOUTS["vqav2"]["mirror"](tmp_path / "data")
    options = {"data": tmp_path / "data", "model": blip2.load()}
    whole = evaluate("vqav2", tmp_path / "whole", **options)
    first = begun("vqav2", tmp_path / "data", tmp_path / "out", {"limit": 5, "model": options["model"]})
    first.run.run()
    assert first.num_missing == whole["rows"] - 5
    for number in (1, 2):
        part = begun("vqav2", tmp_path / "data", tmp_path / "parts", {"shard": (number, 2), "model": options["model"]})
        part.run.run()
    assert part.num_missing == 0 and part.scores()["scores"] == whole["scores"]
    assert evaluate("vqav2", tmp_path / "out", **options)["scores"] == whole["scores"]


@pytest.mark.parametrize("name", [
    "vqav2", "aokvqa-choices", pytest.param("flickr30k-retrieval", marks=pytest.mark.slow)
])
def test_alone_as_in_company(tmp_path, name):
    LAYOUTS[name]["official"](tmp_path / "data")
    some, alone = (
        evaluate(name, tmp_path / str(size), data=tmp_path / "data", batch_size=size) for size in (16, 1)
    )
    assert some["scores"] == alone["scores"]
    said = [[json.loads(line)["caption"] for line in (tmp_path / size / ANSWERS).read_text().splitlines()]
            for size in ("16", "1")]  # fmt: skip
    assert said[0] == said[1]


def test_a_picture_is_seen_once_for_all_its_questions(tmp_path, monkeypatch):
    LAYOUTS["vqav2"]["official"](tmp_path / "data")
    seen: Counter[str] = Counter()
    pixels = ImageFrontend.pixels

    def counting(frontend, image):
        seen[str(image)] += 1
        return pixels(frontend, image)

    monkeypatch.setattr(ImageFrontend, "pixels", counting)
    report = evaluate("vqav2", tmp_path / "out", data=tmp_path / "data", batch_size=16)
    assert report["rows"] == 24 and len(seen) == 12 and set(seen.values()) == {1}


def test_rows_are_not_made_again_of_the_same_files(tmp_path):
    LAYOUTS["okvqa"]["mirror"](tmp_path / "data")
    begun("okvqa", tmp_path / "data", tmp_path / "out", {"model": blip2.load()})
    rows = tmp_path / "out" / "rows.jsonl"
    before = rows.stat().st_mtime_ns
    begun("okvqa", tmp_path / "data", tmp_path / "out", {"model": blip2.load()})
    assert rows.stat().st_mtime_ns == before
    begun("okvqa", tmp_path / "data", tmp_path / "out", {"model": blip2.load(), "first": 3})
    assert len(rows.read_text().splitlines()) == 3
    assert len(list((tmp_path / "data" / "unpacked" / "okvqa").iterdir())) == 12
