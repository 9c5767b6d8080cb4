"""``blip2 caption``: lines in order, broken pictures beside sound ones, JSON, folders, standard input."""

import json
from pathlib import Path

import pytest

import blip2


@pytest.fixture(scope="module")
def texts(opt_model, pictures):
    """What Python says of the same pictures, each on one line as the command prints it."""
    found = blip2.load(opt_model).caption(pictures, max_new_tokens=6)
    return [" ".join(text.split()) for text in found]


def test_one_picture_gives_the_text_alone(run, model, pictures, texts):
    result = run("caption", pictures[0], *model)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{texts[0]}\n", "")


def test_several_in_order(run, model, pictures, texts):
    expected = "".join(f"{path}\t{text}\n" for path, text in zip(pictures, texts, strict=True))
    for batch_size in (1, 3, 8):
        result = run("caption", *pictures, *model, "--batch-size", batch_size)
        assert (result.exit_code, result.stdout) == (0, expected)


def test_broken_ones_do_not_stop_the_others(run, model, pictures, texts, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing of the kind")
    result = run("caption", pictures[0], broken, pictures[1], tmp_path / "missing.png", *model, "--batch-size", 2)
    assert result.exit_code == 1
    assert result.stdout == f"{pictures[0]}\t{texts[0]}\n{pictures[1]}\t{texts[1]}\n"
    first, second = result.stderr.splitlines()
    assert first.startswith(f"blip2: {broken}: not a JPEG")
    assert second.startswith(f"blip2: {tmp_path / 'missing.png'}: no such file")


def test_only_broken_ones(run, model, tmp_path):
    result = run("caption", tmp_path / "a.png", tmp_path / "b.png", *model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 2


def test_json(run, model, pictures, opt_model, tmp_path):
    result = run("caption", *pictures[:2], tmp_path / "missing.png", "--json", *model)
    first, second, missing = map(json.loads, result.stdout.splitlines())
    assert list(first) == ["image", "text", "score", "tokens", "seconds", "model"]
    assert [first["image"], second["image"]] == pictures[:2]
    assert first["model"] == str(opt_model)
    assert 0 < first["tokens"] <= 6 and first["score"] < 0 and first["seconds"] > 0
    assert list(missing) == ["image", "error", "model"] and "no such file" in missing["error"]
    assert result.exit_code == 1


def test_several_captions(run, model, pictures, texts):
    result = run("caption", pictures[0], "-n", 3, *model)
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[0] == texts[0]
    sampled = ["caption", pictures[0], "-n", 2, "--sample", "--seed", 1, "--temperature", 0.7, "--top-p", 0.9, *model]
    assert run(*sampled).stdout == run(*sampled).stdout != ""


def test_options_reach_the_engine(run, opt_model, pictures):
    blip = blip2.load(opt_model)
    expected = blip.caption(
        pictures[0], prompt="a photo of", num_beams=2, max_new_tokens=5, min_new_tokens=3, length_penalty=0.5,
        repetition_penalty=1.5, no_repeat_ngram_size=2, stop=("zz", "dogs"),
    )  # fmt: skip
    result = run(
        "caption", pictures[0], "--prompt", "a photo of", "--beams", 2, "--max-new-tokens", 5, "--min-new-tokens", 3,
        "--length-penalty", 0.5, "--repetition-penalty", 1.5, "--no-repeat-ngram", 2, "--stop", "zz", "--stop", "dogs",
        "--model", opt_model, "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert result.stdout == " ".join(expected.split()) + "\n"


def test_standard_input(run, model, pictures, texts):
    result = run("caption", "-", *model, input=Path(pictures[2]).read_bytes())
    assert (result.exit_code, result.stdout) == (0, f"{texts[2]}\n")
    result = run("caption", "-", *model, input=b"")
    assert result.exit_code == 1
    assert result.stderr.startswith("blip2: standard input: empty")
    assert run("caption", "-", "-", *model, input=b"").exit_code == 2


def test_folders(run, model, pictures, texts, tmp_path):
    for path, name in zip(pictures, ["b.PNG", "a.png", "inner/c.png", ".hidden.png", "notes.txt"], strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(Path(path).read_bytes())
    (tmp_path / "inner" / "circle").symlink_to(tmp_path)
    result = run("caption", tmp_path, *model)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/a.png\t{texts[1]}\n{tmp_path}/b.PNG\t{texts[0]}\n")
    result = run("caption", "-r", tmp_path, *model)
    assert result.stdout.splitlines()[2:] == [f"{tmp_path}/inner/c.png\t{texts[2]}"]
    result = run("caption", tmp_path / "inner", *model)  # one picture, but found by the command: it tells which
    assert result.stdout == f"{tmp_path}/inner/c.png\t{texts[2]}\n"


def test_a_folder_without_pictures(run, model, pictures, texts, tmp_path):
    result = run("caption", tmp_path, pictures[0], *model)
    assert (result.exit_code, result.stdout) == (1, f"{pictures[0]}\t{texts[0]}\n")
    assert "there are no pictures in this folder (bmp gif jpeg jpg png webp); -r also looks" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--beams", 0], "--beams is 0; it may be a whole number"),
        (["--beams", "many"], "'many' is not a valid integer"),
        (["--beam", 3], "No such option"),
        (["--temperature", 0.5], "--temperature is 0.5, but nothing is sampled; set --sample"),
        (["--sample", "--beams", 3], "--sample goes with --beams=1"),
        (["-n", 0], "--num-captions is 0"),
        (["--batch-size", 0], "--batch-size=0 is not possible"),
        (["--dtype", "float8"], "'float8' is not one of"),
        (["--stop", ""], "--stop is"),
        (["--dtype", "float16"], "float16 is not for the CPU"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
    ],
)
def test_wrong_use(run, opt_model, pictures, options, words):
    result = run("caption", pictures[0], "--model", opt_model, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("blip2: ") and words in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_picture(run):
    result = run("caption")
    assert result.exit_code == 2
    assert result.stderr == "blip2: Missing argument 'IMAGES...'. (see blip2 caption --help)\n"
