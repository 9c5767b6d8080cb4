"""``blip2 explain``: an image of the map, the map as numbers, or where it is strongest."""

import json

import numpy as np
import pytest
from PIL import Image

import blip2


@pytest.fixture
def matching(matching_model):
    return ["--model", matching_model]


def test_a_text(run, pictures, matching, matching_model, tmp_path):
    out = tmp_path / "heat.png"
    result = run("explain", pictures[0], "a dog", "-o", out, *matching)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a dog\n", "")
    expected = blip2.load(matching_model).explain(pictures[0], "a dog")
    with Image.open(out) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected.overlay()))
    assert [path.name for path in tmp_path.iterdir()] == ["heat.png"]


def test_an_answer_and_a_word(run, pictures, opt_model, tmp_path):
    blip = blip2.load(opt_model)
    model = ["--model", opt_model]
    own = run("explain", pictures[0], "--question", "is it red?", "--json", *model)
    row = json.loads(own.stdout)
    assert list(row) == ["image", "text", "score", "strongest", "file", "seconds", "model"]
    expected = blip.explain(pictures[0], question="is it red?")
    assert row["text"] == expected.text and row["file"] is None
    assert row["score"] == pytest.approx(expected.score, abs=1e-4)
    assert tuple(row["strongest"]) == expected.strongest

    out = tmp_path / "heat.npy"
    given = run("explain", pictures[0], "-q", "is it red?", "-a", "on the left", "-o", out, *model)
    assert given.stdout == "on the left\n"
    heat = np.load(out)
    assert heat.dtype == np.float32
    assert np.array_equal(heat, blip.explain(pictures[0], question="is it red?", answer="on the left").heat.numpy())

    word = run("explain", pictures[0], "-w", "dogs", "-c", "two dogs", "-o", tmp_path / "heat.jpg", *model, "--json")
    assert json.loads(word.stdout)["text"] == "dogs" and (tmp_path / "heat.jpg").exists()


def test_what_is_there_stays_if_it_cannot_be_replaced(run, pictures, matching, tmp_path):
    out = tmp_path / "heat.png"
    out.mkdir()
    result = run("explain", pictures[0], "a dog", "-o", out, *matching)
    assert result.exit_code == 1 and "heat.png: cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["heat.png"]


def test_a_word_that_is_not_in_the_caption(run, pictures, opt_model):
    result = run("explain", pictures[0], "-w", "cat", "-c", "two dogs", "--json", "--model", opt_model)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the word 'cat' is not in the caption 'two dogs'" in result.stderr


def test_a_model_of_the_other_sort(run, pictures, opt_model, matching_model):
    result = run("explain", pictures[0], "a dog", "--json", "--model", opt_model)
    assert result.exit_code == 1 and "name a matching model" in result.stderr
    result = run("explain", pictures[0], "-w", "dog", "--json", "--model", matching_model)
    assert result.exit_code == 1 and "name a generative model" in result.stderr


def test_a_picture_that_cannot_be_read(run, matching, tmp_path):
    result = run("explain", tmp_path / "missing.png", "a dog", "--json", *matching)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "missing.png: no such file" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{0}"], 2, "there is nothing to explain"),
        (["{0}", "a dog"], 2, "give a file with -o heat.png"),
        (["{0}", " ", "--json"], 2, "texts is empty"),
        (["{0}", "a dog", "-q", "is it?", "--json"], 2, "leave out TEXT or --question"),
        (["{0}", "a dog", "-a", "two", "--json"], 2, "leave out TEXT or --answer"),
        (["{0}", "-q", "is it?", "-w", "dog", "--json"], 2, "leave out --word and --caption"),
        (["{0}", "-w", "dog", "-a", "two", "--json"], 2, "--answer needs --question"),
        (["{0}", "-q", "", "--json"], 2, "the question is empty"),
        (["{0}", "a dog", "-o", "heat.gif"], 2, "heat.gif: images are written as .png"),
        (["{0}", "a dog", "-o", "/no/such/folder/heat.png"], 1, "there is no folder /no/such/folder"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_use_is_told_before_a_model_is_loaded(run, pictures, arguments, code, words):
    result = run("explain", *(argument.format(*pictures) for argument in arguments), "--model", "/no/such/model")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("blip2: ") and words in result.stderr and result.stderr.count("\n") == 1
