"""``blip2 convert``: which way it goes, what it shows, how it ends. What it does is tested in tests/checkpoint."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2 import cli
from blip2.cli.convert import command


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The verb is in the list."""
    monkeypatch.setitem(cli.COMMANDS, "convert", command.help.splitlines()[0])


@pytest.fixture
def trained(run, opt_model, tmp_path):
    """The .pth file of the tiny model."""
    assert run("convert", opt_model, tmp_path / "trained.pth").exit_code == 0
    return tmp_path / "trained.pth"


def test_a_folder_becomes_a_file_and_a_file_a_folder(run, opt_model, tmp_path):
    result = run("convert", opt_model, tmp_path / "a.pth")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'a.pth'}\n", "")
    result = run("convert", tmp_path / "a.pth", tmp_path / "back", "--like", opt_model)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'back'}\n", "")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (opt_model, tmp_path / "back"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_frozen_parts_are_written_if_asked_for(run, monkeypatch, opt_model, tmp_path):
    given = []
    monkeypatch.setattr("blip2.checkpoint.lavis.convert_to_lavis", lambda *places, **options: given.append(options))
    for more in ([], ["--all"]):
        assert run("convert", opt_model, tmp_path / "a.pth", *more).exit_code == 0
    assert [options["trainable_only"] for options in given] == [True, False]


def test_where_the_frozen_parts_are_is_handed_on(run, monkeypatch, trained, tmp_path):
    given = []
    monkeypatch.setattr("blip2.checkpoint.lavis.convert_from_lavis", lambda *places, **options: given.append(options))
    options = {"like": "nobody/model", "vision": "eva_vit_g.pth", "language": "google/flan-t5-xl"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert run("convert", trained, tmp_path / "back", *arguments).exit_code == 0
    assert given == [options | {"progress": None}]


def test_what_cannot_be_converted_is_one_line(run, trained, opt_model, tmp_path):
    (tmp_path / "notes.pth").write_text("hello")
    for source, out, more, words in (
        (tmp_path / "notes.pth", "out", [], "notes.pth: is damaged"),
        (trained, "out", [], "does not have the size of a published model; name a model with its config"),
        (trained, "out", ["--like", tmp_path / "nobody"], "no such folder"),
        (opt_model, trained, [], "exists already"),
    ):
        result = run("convert", source, tmp_path / out, *more)
        assert (result.exit_code, result.stdout) == (1, ""), words
        assert words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--like", "--vision", "--language", "--all"])
def test_options_of_the_other_direction_are_refused(run, flag, trained, opt_model, tmp_path):
    source = trained if flag == "--all" else opt_model
    result = run("convert", source, tmp_path / "out", flag, *([] if flag == "--all" else ["x"]))
    assert result.exit_code == 2
    assert f"{flag} needs" in result.stderr and result.stderr.count("\n") == 1


def test_no_such_source(run, tmp_path):
    result = run("convert", tmp_path / "no.pth", tmp_path / "out")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_shown_on_a_terminal_and_there_only(run, opt_model, tmp_path, monkeypatch):
    import pty

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with pytest.raises(SystemExit) as ended:
            cli.main(["convert", str(opt_model), str(tmp_path / "a.pth")])
    assert ended.value.code == 0
    total = len(torch.load(tmp_path / "a.pth")["model"])
    assert f"{total}/{total}".encode() in everything(ours)


def everything(terminal):
    """What was written to a terminal that nobody writes to any more: it comes in pieces, and ends with an error."""
    pieces = []
    try:
        while piece := os.read(terminal, 100_000):
            pieces.append(piece)
    except OSError:
        pass
    finally:
        os.close(terminal)
    return b"".join(pieces)


def test_the_help_names_files_that_people_have(run):
    result = run("convert", "--help")
    assert result.exit_code == 0
    for words in ("eva_vit_g.pth", "google/flan-t5-xl", "--all"):
        assert words in result.stdout


def test_importing_the_verb_is_cheap():
    import subprocess

    check = "import sys, blip2.cli.convert; print(sorted({'torch', 'rich', 'safetensors'} & set(sys.modules)))"
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"
