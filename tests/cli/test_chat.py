"""``blip2 chat``: through a pipe line by line, and on a terminal."""

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import blip2

ROOT = Path(__file__).parents[2]
SHORT = ["--max-new-tokens", "6"]


def answers(opt_model, picture, *questions):
    chat = blip2.load(opt_model).chat(picture, max_new_tokens=6)
    return "".join(chat.say(question) + "\n" for question in questions)


def test_each_line_a_question(run, model, opt_model, pictures):
    result = run("chat", pictures[0], *model, input="what is there?\n\nand where?\n")
    assert result.exit_code == 0
    assert result.stdout == answers(opt_model, pictures[0], "what is there?", "and where?")
    assert result.stderr == ""


def test_questions_with_a_byte_order_mark(run, model, opt_model, pictures):
    for encoding in ("utf-8-sig", "utf-16"):
        result = run("chat", pictures[0], *model, input="what is there?\r\nand where?".encode(encoding))
        assert result.stdout == answers(opt_model, pictures[0], "what is there?", "and where?")
    result = run("chat", pictures[0], *model, input=b"\xe9?\n")
    assert result.exit_code == 2 and "standard input is not UTF-8 text" in result.stderr


def test_commands(run, model, opt_model, pictures):
    lines = f"/image {pictures[1]}\nwhat?\n/image {pictures[0]}\nwhat?\n/reset\nwhat?\n/help\n/quit\nnot asked\n"
    result = run("chat", *model, input=lines)
    first, second = (answers(opt_model, picture, "what?") for picture in pictures[1::-1])
    assert result.stdout == first + second + second
    assert "/image FILE" in result.stderr


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ("what?\n", 2, "there is no image yet; name one with /image FILE"),
        ("/image\n", 2, "write /image FILE"),
        ("/image nowhere.png\n", 1, "nowhere.png: no such file"),
        ("/dance\n", 2, "there is no command '/dance'; /help lists"),
    ],
)
def test_errors_end_a_pipe(run, model, lines, code, words):
    result = run("chat", *model, input=lines + "what?\n")
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_the_picture_does_not_come_from_where_the_questions_come_from(run):
    result = run("chat", "-", input="")
    assert result.exit_code == 2
    assert "standard input holds the questions" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal(opt_model, pictures):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "blip2", "chat", pictures[0], "--model", str(opt_model), *SHORT]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)

    def read_until(pattern):
        text, deadline = "", time.monotonic() + 60
        while not re.search(pattern, text):
            assert time.monotonic() < deadline, text
            if select.select([ours], [], [], 1)[0]:
                try:
                    text += os.read(ours, 4096).decode(errors="replace")
                except OSError:  # the other side has left
                    break
        return text.replace("\r", "")

    try:
        assert "/help lists the commands" in read_until("> $")
        os.write(ours, b"/dance\n")
        assert "there is no command '/dance'" in read_until("> $")
        os.write(ours, b"/image nowhere.png\n")
        assert "nowhere.png: no such file" in read_until("> $")
        os.write(ours, b"what is there?\n")
        said = read_until("> $")
        # A terminal shows control characters in ways of its own; words are enough.
        words = re.findall(r"[A-Za-z]+", answers(opt_model, pictures[0], "what is there?"))
        assert all(word in said for word in words)
        os.write(ours, b"/quit\n")
        read_until("never")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
