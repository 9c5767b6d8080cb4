"""``blip2 ask``: the question last, or several by -q; choices; what is wrong told before a model is loaded."""

import json

import pytest

import blip2


@pytest.fixture(scope="module")
def blip(opt_model):
    return blip2.load(opt_model)


def line(text):
    return " ".join(text.split())


def test_one_picture_gives_the_answer_alone(run, model, pictures, blip):
    result = run("ask", pictures[0], "how many dogs?", *model)
    expected = line(blip.ask(pictures[0], "how many dogs?", max_new_tokens=6))
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{expected}\n", "")


def test_several_pictures(run, model, pictures, blip, tmp_path):
    result = run("ask", *pictures[:3], tmp_path / "missing.png", "is it red?", *model)
    answers = blip.ask(pictures[:3], "is it red?", max_new_tokens=6)
    assert result.stdout == "".join(f"{path}\t{line(text)}\n" for path, text in zip(pictures, answers, strict=False))
    assert result.exit_code == 1
    assert "missing.png: no such file" in result.stderr


def test_several_questions(run, model, pictures, blip):
    questions = ["is it red?", "how  many?"]
    asked = ["-q", questions[0], "-q", questions[1]]
    result = run("ask", *pictures[:3], *asked, *model, "--batch-size", 2)
    assert result.stdout == "".join(
        f"{path}\t{line(question)}\t{line(blip.ask(path, question, max_new_tokens=6))}\n"
        for path in pictures[:3]
        for question in questions
    )
    lines = run("ask", pictures[0], *asked, *model).stdout.splitlines()
    assert [text.split("\t")[0] for text in lines] == ["is it red?", "how many?"]


def test_json(run, model, pictures):
    result = run("ask", pictures[0], "is it red?", "--json", *model)
    row = json.loads(result.stdout)
    assert list(row) == ["image", "question", "text", "score", "tokens", "seconds", "model"]
    assert row["question"] == "is it red?"


def test_choices(run, opt_model, pictures, blip):
    arguments = ["ask", *pictures[:2], "is it red?", "--choices", "yes, no,on the left", "--model", opt_model]
    ranked = blip.rank(pictures[:2], "is it red?", ["yes", "no", "on the left"])
    lines = run(*arguments).stdout.splitlines()
    assert lines == [f"{path}\t{row[0].text}" for path, row in zip(pictures, ranked, strict=False)]
    rows = [json.loads(text) for text in run(*arguments, "--json").stdout.splitlines()]
    for row, expected in zip(rows, ranked, strict=True):
        assert list(row["choices"]) == [choice.text for choice in expected]
        assert list(row["choices"].values()) == pytest.approx([choice.probability for choice in expected], abs=1e-5)
        assert sum(row["choices"].values()) == pytest.approx(1, abs=1e-5)
        assert row["score"] == pytest.approx(expected[0].score, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{0}"], "there is no question; give the image first, the question last"),
        (["is it red?"], "there is no image; give the image first"),
        (["{0}", "{1}"], "is a file; put the question last"),
        (["{0}", ""], "the question is empty; write one"),
        (["{0}", "-q", " "], "the question is empty"),
        (["{0}", "Question: is it? Answer:"], "give the question alone"),
        (["{0}", "is it?", "--choices", "yes"], "give at least two"),
        (["{0}", "is it?", "--choices", "yes,"], "one of the choices is empty"),
        (["{0}", "is it?", "--choices", "yes,no", "--beams", "3"], "leave out the decoding options"),
        (["{0}", "is it?", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ([], "Missing argument"),
    ],
)
def test_wrong_use_is_told_before_a_model_is_loaded(run, pictures, arguments, words):
    arguments = [argument.format(*pictures) for argument in arguments]
    result = run("ask", *arguments, "--model", "/no/such/model")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("blip2: ") and words in result.stderr
    assert result.stderr.count("\n") == 1


def test_pictures_from_a_list(run, model, pictures, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(pictures[:2]))
    expected = run("ask", *pictures[:2], "is it red?", *model).stdout
    assert expected.count("\n") == 2
    assert run("ask", "--files-from", listed, "is it red?", *model).stdout == expected
    assert run("ask", "--files-from", listed, "-q", "is it red?", *model).stdout == expected
    assert run("ask", "--files-from", listed, "is it red?", "-0", *model).exit_code == 1  # a name with a newline in it
    assert run("ask", "--files-from", listed, *model).exit_code == 2
