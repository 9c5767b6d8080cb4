"""``blip2 caption``: lines in order, broken images beside sound ones, JSON, folders, standard input."""

import json
from pathlib import Path

import pytest

import blip2
from blip2.cli import main


@pytest.fixture(scope="module")
def texts(opt_model, pictures):
    """What Python says of the same images, each on one line as the command prints it."""
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
    result = run("caption", tmp_path, *model, "--no-recursive")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/a.png\t{texts[1]}\n{tmp_path}/b.PNG\t{texts[0]}\n")
    assert result.stderr == "blip2: skipped in folders: 1 other file (1 .txt)\n"
    for default in ([], ["-r"], ["--recursive"]):
        result = run("caption", *default, tmp_path, *model)
        assert result.stdout.splitlines()[2:] == [f"{tmp_path}/inner/c.png\t{texts[2]}"]
    assert result.stderr == "blip2: skipped in folders: 1 other file (1 .txt), 1 linked folder\n"
    for pattern in ("inner", "inner/*.png", "c.*"):
        assert "c.png" not in run("caption", "--exclude", pattern, tmp_path, *model).stdout
    result = run("caption", tmp_path / "inner", *model)  # one image, but found by the command: it tells which
    assert result.stdout == f"{tmp_path}/inner/c.png\t{texts[2]}\n"


def test_a_folder_without_pictures(run, model, pictures, texts, tmp_path):
    result = run("caption", tmp_path, pictures[0], *model)
    assert (result.exit_code, result.stdout) == (1, f"{pictures[0]}\t{texts[0]}\n")
    assert result.stderr == f"blip2: {tmp_path}: there are no images in this folder\n"
    (tmp_path / "within").mkdir()
    result = run("caption", tmp_path, pictures[0], *model, "--no-recursive")
    assert "no images in this folder; its subfolders were not searched" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--beams", 0], "--beams is 0; it may be a whole number"),
        (["--beams", "many"], "'many' is not a valid integer"),
        (["--beam", 3], "No such option"),
        (["--temperature", 0.5], "--temperature is 0.5, but sampling is off; add --sample"),
        (["--sample", "--beams", 3], "--sample needs --beams=1"),
        (["-n", 0], "--num-captions is 0"),
        (["--batch-size", 0], "--batch-size is 0; use 1"),
        (["--dtype", "float8"], "'float8' is not one of"),
        (["--stop", ""], "--stop is"),
        (["--dtype", "float16"], "float16 is not supported on a CPU"),
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


# ---- names and lists ----------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path, pictures):
    """Names as no one should give them, in order."""
    names = ["a\ttab.png", "back\\slash.png", "plain \N{NARROW NO-BREAK SPACE}é.png", "two\nlines.png"]
    for name in names:
        (tmp_path / name).write_bytes(Path(pictures[0]).read_bytes())
    return [f"{tmp_path}/{name}" for name in names]


def test_a_line_is_a_picture_whatever_its_name(run, model, texts, odd):
    lines = run("caption", *odd, *model).stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == [texts[0]] * 4
    names = [line.split("\t")[0].rpartition("/")[2] for line in lines]
    assert names == [r"a\ttab.png", r"back\\slash.png", "plain \N{NARROW NO-BREAK SPACE}é.png", r"two\nlines.png"]
    rows = run("caption", "-0", *odd, *model).stdout
    assert rows == "".join(f"{name}\t{texts[0]}\0" for name in odd)


@pytest.mark.parametrize("source", ["-", "list.txt"])
def test_pictures_from_a_list(run, model, pictures, texts, odd, tmp_path, monkeypatch, source):
    def listed(content: bytes, *options) -> object:
        (tmp_path / "list.txt").write_bytes(content)
        name = source if source == "-" else tmp_path / source
        return run("caption", "--files-from", name, *options, *model, input=content if source == "-" else b"")

    expected = f"{pictures[1]}\t{texts[1]}\n{pictures[2]}\t{texts[2]}\n"
    for content in (
        f"{pictures[1]}\n{pictures[2]}\n".encode(),
        f"\ufeff{pictures[1]}\r\n\r\n{pictures[2]}".encode(),
        f"{pictures[1]}\r\n{pictures[2]}\r\n".encode("utf-16"),
    ):
        assert (result := listed(content)).stdout == expected and result.exit_code == 0
    assert listed(pictures[1].encode()).stdout == f"{pictures[1]}\t{texts[1]}\n"  # a list tells which, also of one
    result = listed("".join(f"{name}\0" for name in odd).encode(), "-0")
    assert result.stdout == "".join(f"{name}\t{texts[0]}\0" for name in odd)
    for content, options, words in (
        (b"", [], "names no image"),
        (b"\n \n", [], "names no image"),
        (b"a.png\0b.png\0", [], "add -0 if they separate the names"),
    ):
        result = listed(content, *options)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    monkeypatch.chdir(Path(pictures[0]).parent)
    assert listed(Path(pictures[3]).name.encode()).stdout == f"{Path(pictures[3]).name}\t{texts[3]}\n"


def test_lists_that_cannot_be(run, tmp_path):
    for arguments, words in (
        (["--files-from", tmp_path / "missing"], "missing: cannot be read (No such file or directory)"),
        (["--files-from", tmp_path], "cannot be read (Is a directory)"),
        (["-", "--files-from", "-"], "standard input cannot be both"),
    ):
        result = run("caption", *arguments, input=b"")
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr and result.stderr.count("\n") == 1


def test_a_list_where_a_picture_is_wanted_is_told_so(run, model, tmp_path):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    result = run("caption", tmp_path / "list.txt", *model)
    assert result.exit_code == 1
    assert result.stderr.endswith("but text; name an image, or give a list of names by --files-from\n")


def test_what_is_read_is_said_by_flags(run, model, tmp_path, pictures):
    content = Path(pictures[0]).read_bytes()
    cut = tmp_path / "allow_truncated=True.png"
    cut.write_bytes(content[: len(content) * 3 // 4])
    result = run("caption", cut, *model)
    assert result.exit_code == 1 and result.stderr.endswith(", or read the rest with --allow-truncated\n")
    assert str(cut) in result.stderr
    assert run("caption", cut, "--allow-truncated", *model).exit_code == 0
    result = run("caption", pictures[0], "--max-pixels", 9, *model)
    assert result.exit_code == 1 and "is more than 9 pixels; make it smaller, or raise --max-pixels" in result.stderr
    assert "--max-pixels is 0" in run("caption", pictures[0], "--max-pixels", 0, *model).stderr


def test_json_speaks_of_flags_too(run, model, tmp_path, pictures):
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(pictures[0]).read_bytes()[:-40])
    row = json.loads(run("caption", cut, "--json", *model).stdout)
    assert row["error"].endswith("or read the rest with --allow-truncated")


def test_a_list_in_utf_32(run, model, texts, pictures, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_bytes(f"{pictures[0]}\r\n".encode("utf-32"))
    assert run("caption", "--files-from", listed, *model).stdout == f"{pictures[0]}\t{texts[0]}\n"


def test_closed_standard_input_is_an_empty_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit, match="2"):
        main(["caption", "--files-from", "-"])
    assert capsys.readouterr().err == "blip2: --files-from -: names no image; write one name per line\n"
