"""``blip2 match``: the table, its order, JSON, labels from a file, and what cannot be compared."""

import json

import pytest

import blip2


@pytest.fixture
def model(matching_model):
    return ["--model", matching_model]


def test_a_table_for_one_picture(run, model, matching_model, pictures):
    result = run("match", pictures[0], "a dog", "two dogs and a red car", *model)
    assert (result.exit_code, result.stderr) == (0, "")
    heading, *lines = result.stdout.splitlines()
    assert heading.split() == ["match", "cosine", "share", "text"]
    expected = blip2.load(matching_model).classify(pictures[0], ["a dog", "two dogs and a red car"])
    assert [line[26:] for line in lines] == [match.text for match in expected]
    for line, match in zip(lines, expected, strict=True):
        probability, cosine, share = line[:26].split()
        assert probability == f"{match.itm_probability:.1%}"
        assert float(cosine) == pytest.approx(match.itc_cosine, abs=6e-4)
        assert share == f"{match.itc_probability:.1%}"


def test_json_has_every_pair(run, model, pictures):
    texts = ["a dog", "a red car", "where"]
    options = [part for text in texts for part in ("-t", text)]
    result = run("match", *pictures[:2], *options, "--json", *model)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["image"] for row in rows] == [pictures[0]] * 3 + [pictures[1]] * 3
    assert all({row["text"] for row in rows[start : start + 3]} == set(texts) for start in (0, 3))
    for row in rows:
        assert 0 < row["itm_probability"] < 1 and -1 <= row["itc_cosine"] <= 1
    assert sum(row["itc_probability"] for row in rows[:3]) == pytest.approx(1)


def test_labels_from_a_file(run, model, pictures, tmp_path):
    (tmp_path / "labels.txt").write_text("dog\n\n  red car \ncat\n", "utf-8")
    options = ["--labels", tmp_path / "labels.txt", "--template", "a photo of {}", "--json", *model]
    every = [json.loads(line) for line in run("match", pictures[0], *options).stdout.splitlines()]
    assert {row["text"] for row in every} == {"dog", "red car", "cat"}
    best = [json.loads(line) for line in run("match", pictures[0], *options, "--top", 2).stdout.splitlines()]
    assert [row["text"] for row in best] == [row["text"] for row in every[:2]]
    assert best[0]["itm_probability"] == pytest.approx(every[0]["itm_probability"], abs=1e-5)


def test_the_template_is_read(run, model, pictures):
    found = [
        json.loads(run("match", pictures[0], text, *options, "--json", *model).stdout)["itm_probability"]
        for text, options in (("dog", []), ("dog", ["--template", "two {} there"]), ("two dog there", []))
    ]
    assert found[1] == pytest.approx(found[2], abs=1e-6) and found[0] != pytest.approx(found[1], abs=1e-6)


def test_a_picture_that_cannot_be_read(run, model, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    result = run("match", tmp_path / "broken.png", pictures[0], "-t", "a dog", *model)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "broken.png" in result.stderr
    assert result.stdout.startswith(f"{pictures[0]}\t") and result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["IMAGE"], "there is no text", 2),
        (["IMAGE", "IMAGE", "a dog"], "is a file, but a text belongs there", 2),
        (["IMAGE", " "], "one of the texts is empty", 2),
        (["IMAGE", "dog " * 600], "at most 62 are read", 2),
        (["IMAGE", "a dog", "--top", "0"], "--top is 0", 2),
        (["IMAGE", "a dog", "--template", "photo"], "--template is 'photo', without a place", 2),
        (["IMAGE", "--labels", "FOLDER/none.txt"], "none.txt: cannot be read", 2),
        (["IMAGE", "--labels", "FOLDER/empty.txt"], "empty.txt: contains no label", 2),
        (["IMAGE", "--labels", "FOLDER/binary.txt"], "not UTF-8", 2),
        (["FOLDER/none.png", "a dog"], "no such file", 1),
        (["IMAGE", "a dog", "-m", "miniature"], "name a matching model", 1),
    ],
)
def test_what_cannot_be_compared(run, model, pictures, tmp_path, arguments, words, code):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xe9t\xe9\n")
    arguments = [
        pictures[0] if part == "IMAGE" else part.replace("FOLDER", str(tmp_path)) for part in arguments
    ]
    result = run("match", *([*arguments] if "-m" in arguments else [*arguments, *model]))
    assert result.exit_code == code and words in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])  # Notepad's, and of PowerShell's ">"
def test_labels_as_any_editor_saves_them(run, model, pictures, tmp_path, encoding):
    (tmp_path / "labels.txt").write_bytes("a dog\r\n\r\na café \r\n".encode(encoding))
    result = run("match", pictures[0], "--labels", tmp_path / "labels.txt", "--json", *model)
    assert {json.loads(line)["text"] for line in result.stdout.splitlines()} == {"a dog", "a café"}


def test_a_generative_verb_refuses_a_matching_model(run, model, pictures):
    result = run("caption", pictures[0], *model)
    assert result.exit_code == 1 and "is a matching model" in result.stderr


def test_pictures_from_a_list(run, model, pictures, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(pictures[:2]))
    expected = run("match", *pictures[:2], "-t", "a dog", "-t", "a car", *model).stdout
    assert expected.count("\n") == 4
    assert run("match", "--files-from", listed, "a dog", "a car", *model).stdout == expected
    assert run("match", "--files-from", listed, "-t", "a dog", "-t", "a car", *model).stdout == expected
    nulls = run("match", *pictures[:2], "-t", "a dog", "-t", "a car", "-0", *model).stdout
    assert nulls == expected.replace("\n", "\0")
    assert "there is no text" in run("match", "--files-from", listed, *model).stderr
