"""Losses of runs side by side."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from miniature import answers, curves, world


def log(folder, *lines):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    first = log(
        tmp_path / "first",
        {"step": 10, "itc": 3.0, "lm": 5.0, "learning_rate": 1e-4},
        {"step": 20, "itc": 2.0, "lm": 4.0, "learning_rate": 1e-4},
        {"step": 20, "evaluation": {"itc": 2.5, "lm": 4.5, "matching": 0.7}},
    )
    second = log(tmp_path / "second", {"step": 10, "itc": 1.0, "lm": 1.0}, {"step": 20, "evaluation": {"itc": 0.5}})
    return {"<first>": curves.read_log(first), "second": curves.read_log(second)}


def test_the_table_has_the_held_out_values_of_each_run(runs):
    lines = curves.table(runs, [20]).splitlines()
    assert lines[0] == "| held out | <first>, step 20 | second, step 20 |"
    assert "| itc | 2.500 | 0.500 |" in lines and "| matching | 0.700 |  |" in lines


def test_the_picture_has_a_panel_a_loss_and_a_line_for_each_of_training_and_held_out(runs):
    root = ElementTree.fromstring(curves.draw(runs))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert curves.LOSSES["itc"] in texts and curves.LOSSES["lm"] in texts and curves.LOSSES["itm"] not in texts
    assert "<first>" in texts
    lines = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert sorted(map(len, lines)) == [0, 1, 1, 1, 1, 1, 2, 2]
    width, height = float(root.get("width")), float(root.get("height"))
    for point in (point for line in lines for point in line):
        x, y = map(float, point.split(","))
        assert 0 <= x <= width and 0 <= y <= height


@pytest.mark.skipif(not world.FONT_PATH.exists(), reason="needs fonts-noto-color-emoji")
def test_the_same_seed_draws_the_same_questions_half_of_them_unheard_of():
    pairs = answers.drawn(20, 3)
    assert pairs == answers.drawn(20, 3) != answers.drawn(20, 4)
    free = [question for _, question in pairs if question.type == "free"]
    assert len(free) == 10 and len({question.question for question in free}) == 10
    assert all(scene.counts() for scene, _ in pairs)
