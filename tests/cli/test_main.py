"""The command as a whole: how fast help comes, what it imports, how it ends."""

import contextlib
import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2 import __version__, cli
from blip2.errors import OptionError, option, setting

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "blip2"]
HEAVY = {"torch", "PIL", "tokenizers", "numpy", "safetensors", "huggingface_hub", "rich", "transformers"}


def start(*arguments, **extra):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **extra}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **pipes)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([verb, "--help"] for verb in cli.COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "blip2", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & HEAVY
    assert done.returncode == (0 if arguments else 2)


def test_the_list_of_verbs(run):
    result = run("--help")
    assert result.exit_code == 0
    for verb, words in cli.COMMANDS.items():
        assert verb in result.stdout and words in result.stdout
        command = cli.cli.get_command(None, verb)
        assert command.name == verb
        assert command.help.splitlines()[0] == words


def test_version(run):
    first, facts = run("--version").stdout.splitlines()
    assert first == f"blip2 {__version__}"
    assert facts.startswith("commit ") and ", Python 3." in facts and ", torch " in facts and "kernels" in facts


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["captoin"], "No such command 'captoin'; did you mean caption?"),
        (["Serch"], "No such command 'Serch'; did you mean search?"),
        (["help"], "No such command 'help'; did you mean --help?"),
        (["xyz"], "No such command 'xyz'; there are caption, ask, chat, "),
        (["caption", "a.png", "--beam", "3"], "'--beams'"),
        (["ask", "a.png", "b?", "--num-beams", "3"], "'--beams'"),
    ],
)
def test_a_verb_or_an_option_that_is_misspelt(run, given, hint):
    result = run(*given)
    assert result.exit_code == 2
    assert hint in result.stderr and result.stderr.count("\n") == 1


def test_no_such_model(run, pictures):
    result = run("caption", pictures[0], "--model", "/no/such/model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("blip2: /no/such/model: no such folder; give the folder of a model")
    assert result.stderr.count("\n") == 1


def test_a_model_that_cannot_speak(run, pictures, matching_model):
    result = run("ask", pictures[0], "is it?", "--model", matching_model)
    assert result.exit_code == 1
    assert "is a matching model" in result.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_nobody_expected(run, monkeypatch, pictures, place):
    def fail(*arguments, **options):
        raise RuntimeError("a wheel\ncame off")

    monkeypatch.setattr("blip2.api.load", fail)
    result = run("caption", pictures[0])
    assert result.exit_code == 1
    hint = "(this should not happen; --debug shows the traceback)"
    assert result.stderr == f"blip2: RuntimeError: a wheel came off {hint}\n"
    debug = ["--debug", "caption", pictures[0]] if place == "before" else ["caption", pictures[0], "--debug"]
    assert isinstance(run(*debug).exception, RuntimeError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stop", ""], "--stop is ''; it may be one text or several, .* leave out --stop to end where"),
        (["--sample", "--temperature", 0], "--temperature is 0.0; .* leave it out, and leave out --sample$"),
        (
            ["--sample", "--seed", -1],
            r"--seed is -1; .* from 0 to 2\^63 - 1; leave out --seed for different samples each time$",
        ),
        (["--temperature", 0.5], "--temperature is 0.5, but sampling is off; add --sample$"),
        (["--sample", "--beams", 3], "--sample needs --beams=1, not 3: .* give --beams 1, or leave out --sample$"),
        (["--beams", 1, "-n", 2], "--num-captions is 2, .* give --beams 2 or more, or add --sample$"),
        (["--beams", 0], "--beams is 0; it may be a whole number, 1 or more; 1 decodes without beams$"),
        (["--batch-size", 0], "--batch-size is 0; use 1 or more$"),
        (["--length-penalty", "nan"], "--length-penalty is nan; it may be any finite number"),
        (["--quantize-vision"], "--quantize-vision is set without --quantize; give --quantize int8, or int4$"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
    ],
)
def test_errors_speak_of_flags(run, pictures, opt_model, given, message):
    result = run("caption", pictures[0], "--model", opt_model, *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.match(f"blip2: {message}", result.stderr.strip()), result.stderr


def test_a_word_of_a_sentence_is_no_flag():
    verb = cli.cli.get_command(None, "caption")
    assert cli.in_flags(OptionError("the seed is lost, stop"), verb) == "the seed is lost, stop"
    error = OptionError(f"{option('stop')} is 'num_beams'; {setting('sample', True)}")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "stop is 'num_beams'; set sample=True"
    assert cli.in_flags(pickle.loads(pickle.dumps(error)), verb) == "--stop is 'num_beams'; add --sample"


def test_a_reader_that_leaves(opt_model, pictures):
    process = start("caption", *pictures, "--batch-size", 1, "--model", opt_model)
    process.stdout.close()
    assert process.wait(120) != 0
    assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_interrupt(opt_model):
    reading, writing = os.pipe()  # standard input on which nothing ever comes
    # Whoever runs the tests in the background of a shell hands down an interrupt that is ignored.
    effective = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start("caption", "-", "--model", opt_model, stdin=reading, preexec_fn=effective)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    os.close(reading)
    os.close(writing)
    assert (process.returncode, output, errors.strip()) == (130, "", "")


def test_as_a_program(opt_model, pictures):
    process = start("caption", pictures[0], pictures[1], "no.png", "--model", opt_model)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert [line.split("\t")[0] for line in output.splitlines()] == pictures[:2]
    assert errors.splitlines() == [f"blip2: no.png: no such file; check the path (in {ROOT})"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_stays_off_standard_output(opt_model, pictures):
    import pty

    ours, theirs = pty.openpty()
    process = start("caption", *pictures * 3, "no.png", "--max-new-tokens", 2, "--model", opt_model, stderr=theirs)
    os.close(theirs)
    output, _ = process.communicate(timeout=120)
    shown = b""
    with contextlib.suppress(OSError):  # the other side has left
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert [line.split("\t")[0] for line in output.splitlines()] == pictures * 3
    assert b"25/25" in shown
    assert b"\nblip2: no.png: no such file" in shown.replace(b"\x1b[2K", b"\n").replace(b"\r", b"")


def test_names_that_are_no_text(run, model, pictures, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_bytes(Path(pictures[0]).read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    result = run("caption", os.fsdecode(name), pictures[1], *model)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith(f"{tmp_path}/caf\N{REPLACEMENT CHARACTER}.png\t")
    assert run("caption", os.fsdecode(name), "--json", *model).exit_code == 0
