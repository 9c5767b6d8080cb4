"""``blip2 curves``: what is drawn of a run's log, and what is said of what cannot be."""

import json
import re
from xml.etree import ElementTree

import pytest

from blip2.train.curves import MOST_POINTS, _ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def made(tmp_path):
    """``made(name, lines)``: the folder of a run with such a log."""

    def make(name, lines):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return make


def line(step, **values):
    return {"step": step, **values, "learning_rate": 1e-4, "images_per_s": 12.5, "cut_texts": 0, "bad_pictures": 0}


def panels(text):
    return [each.text for each in ElementTree.fromstring(text).iter(f"{SVG}text") if each.get("class") == "title"]


def polylines(text):
    return [
        [tuple(map(float, point.split(","))) for point in each.get("points").split()]
        for each in ElementTree.fromstring(text).iter(f"{SVG}polyline")
    ]


def test_a_panel_for_each_quantity(run, made, tmp_path):
    folder = made("first", [
        line(10, itc=2.0, lm=5.0), line(20, itc=1.0, lm=4.0), {"step": 20, "bad_picture": "a.png", "problem": "no"},
        {"step": 20, "evaluation": {"itc": 1.5, "lm": 4.5, "image_to_text": 0.5}}, line(30, itc=0.5, lm=float("nan")),
    ])  # fmt: skip
    out = tmp_path / "curves.svg"
    result = run("curves", folder, "-o", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    text = out.read_text()
    assert panels(text) == ["itc", "lm", "image to text", "learning rate", "images per s"]
    drawn = polylines(text)
    assert [len(points) for points in drawn] == [3, 1, 2, 1, 1, 3, 3]  # what is no number is left out
    steps, heights = zip(*drawn[0], strict=True)
    assert list(steps) == sorted(steps) and heights[0] < heights[1] < heights[2], "what falls goes down"
    assert heights[2] - heights[1] == pytest.approx((heights[1] - heights[0]) / 2, abs=0.2)


def test_runs_are_compared_in_one_panel(run, made, tmp_path):
    sizes = {"a<b": 1, "c": 3}
    folders = [made(name, [line(step, lm=step * size) for step in range(1, 6)]) for name, size in sizes.items()]
    (folders[1] / "log.jsonl").open("a").write('{"step": 6, "lm"')  # killed while it wrote
    out = tmp_path / "curves.html"
    assert run("curves", *folders, "-o", out).exit_code == 0
    page = out.read_text()
    assert "a&lt;b" in page and "a<b" not in page
    drawn = polylines(re.search(r"<svg.*</svg>", page, re.DOTALL)[0])
    assert [len(points) for points in drawn] == [5] * 6
    assert drawn[0][-1][1] > drawn[1][-1][1], "one scale for both"


def test_a_long_run_is_thinned(run, made, tmp_path):
    folder = made("long", [{"step": step, "lm": 1.0} for step in range(1, 5001)])
    run("curves", folder / "log.jsonl", "-o", tmp_path / "curves.svg")
    [points] = polylines((tmp_path / "curves.svg").read_text())
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 5000, [0, 1000, 2000, 3000, 4000, 5000]), (2, 2, [2, 4]), (0, 0, [0, 1])],
)
def test_ticks_are_round(least, most, expected):
    found = _ticks(least, most)
    assert found[0] <= least and found[-1] >= most and 2 <= len(found) <= 8
    if least != most:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["empty", "-o", "c.svg"], 1, "has no line of numbers yet"),
        (["nothing", "-o", "c.svg"], 1, "it has no log.jsonl; name the 'out' folder of a training"),
        (["gone", "-o", "c.svg"], 1, "gone: No such file or directory; name the 'out' folder of a training"),
        (["good", "-o", "c.png"], 2, "c.png: curves are written as .svg or .html"),
        (["good", "-o", "empty/log.jsonl/c.svg"], 1, "cannot be written"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_cannot_be_drawn_is_said(run, made, tmp_path, monkeypatch, arguments, code, problem):
    monkeypatch.chdir(tmp_path)
    made("empty", [])
    made("good", [line(1, lm=1.0)])
    (tmp_path / "nothing").mkdir()
    result = run("curves", *arguments)
    assert result.exit_code == code
    assert problem in result.stderr and result.stderr.count("\n") == 1
