"""Chat templates: the format in which a language model was trained on conversations.

A template is a program (in Jinja) that comes with published files, so it is not trusted: it runs in a process of its
own, sandboxed and with limits of time and memory (`render`), and never gets user text. It is rendered once for each
number of turns with placeholders, which are replaced afterwards.

The image's vectors are inserted before the first question, inside the first turn of the user.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blip2.errors import CheckpointError, OptionError, option
from blip2.installed import install_line
from blip2.plaintext import NotTextError, read_text

IMAGE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""The place of the image's vectors in a text."""
TEXT_PLACEHOLDER = "\ue000{}\ue001"
"""Placeholder of the question (even numbers) or answer of that number."""
FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
TIMEOUT_S = 20.0
"""Includes the start of the process on a busy machine; the template itself has fewer seconds (`render`)."""
MOST_TURNS = 256


@dataclass(frozen=True)
class ChatTemplate:
    """``source``: of the template. ``names``: special tokens that it may use. ``special``: all special tokens, which
    user text must not contain because they would end a turn."""

    source: str
    names: Mapping[str, str]
    special: frozenset[str]
    where: str = "the chat template"
    _frames: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path, special: frozenset[str]) -> ChatTemplate:
        """From chat_template.jinja or tokenizer_config.json. Raises CheckpointError if there is none."""
        names, source = template_in(folder)
        if source is None:
            raise CheckpointError(
                f"{folder}: there is no {FILE}, and no chat_template in {SETTINGS}; leave {option('chat_template')} "
                "out, or copy it from the language model's folder"
            )
        template = cls(source, names, special, str(folder / (FILE if (folder / FILE).exists() else SETTINGS)))
        template.prompt((), "a")  # to report its errors now
        return template

    def prompt(self, turns: Sequence[tuple[str, str]], question: str) -> str:
        """The text of a conversation up to the model's next answer, with `IMAGE` in it.

        Raises OptionError for text with special tokens, CheckpointError for an unusable template.
        """
        texts = [*(text for turn in turns for text in turn), question]
        for text in texts:
            if token := next((each for each in (*self.special, IMAGE) if each and each in text), None):
                raise OptionError(f"the text contains {token!r}, with which the chat template marks turns; remove it")
        frame = self._frame(len(texts))
        return re.sub("\ue000(\\d+)\ue001", lambda place: texts[int(place[1])], frame)

    def _frame(self, number: int) -> str:
        """The text for a number of questions and answers, with placeholders."""
        if number > MOST_TURNS:
            raise OptionError(f"the conversation has {number} turns, but at most {MOST_TURNS} are supported with a "
                "chat template")
        if number not in self._frames:
            stand_ins = [TEXT_PLACEHOLDER.format(each) for each in range(number)]
            stand_ins[0] = IMAGE + stand_ins[0]
            messages = [
                {"role": "assistant" if each % 2 else "user", "content": text} for each, text in enumerate(stand_ins)
            ]
            frame = _rendered(self.source, messages, dict(self.names), self.where)
            if re.findall("\ue000\\d+\ue001", frame) != [TEXT_PLACEHOLDER.format(each) for each in range(number)]:
                raise CheckpointError(f"{self.where}: drops or repeats texts; use the model without it")
            if frame.count(IMAGE) != 1:
                raise CheckpointError(f"{self.where}: changes texts; use the model without it")
            self._frames[number] = frame
        return self._frames[number]


def template_in(folder: Path) -> tuple[dict[str, str], str | None]:
    """The special tokens that a folder's template may use, and the template; empty and None if there is none. Raises
    CheckpointError."""
    path = folder / SETTINGS
    try:
        settings = json.loads(_text(path)) if path.exists() else {}
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not JSON; fetch the file again") from None
    settings = settings if isinstance(settings, dict) else {}
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named ones
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    if (folder / FILE).exists():
        found = _text(folder / FILE)
    if not isinstance(found, str):
        return {}, None
    names = {name: settings.get(name) for name in SPECIAL}
    contents = {name: each.get("content") if isinstance(each, dict) else each for name, each in names.items()}
    return {name: each for name, each in contents.items() if isinstance(each, str)}, found


def _run(order: str) -> tuple[int, str, str]:
    """The child's exit status, output and error message."""
    command = [sys.executable, str(Path(__file__).with_name("render.py"))]
    done = subprocess.run(command, input=order.encode(), capture_output=True, timeout=TIMEOUT_S, check=False)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def _rendered(source: str, messages: list[dict[str, str]], names: dict[str, str], where: str) -> str:
    """Raises CheckpointError for a template that fails or exceeds its limits, OptionError without jinja2."""
    try:
        status, output, complaint = _run(json.dumps({"source": source, "messages": messages, "names": names}))
    except subprocess.TimeoutExpired:
        status, output, complaint = 1, "", f"it takes longer than {TIMEOUT_S:g} s"
    except OSError as error:
        raise CheckpointError(f"{where}: no process can be started ({error}); use the model without it") from None
    if status == 3:
        raise OptionError(f"{option('chat_template')} needs jinja2; {install_line('chat')}")
    if status != 0:
        reason = " ".join(complaint.split())[-200:] or "it exceeds its limits of time or memory"
        raise CheckpointError(f"{where}: the template cannot be used ({reason}); use the model without it")
    text: str = json.loads(output)
    return text


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, NotTextError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from None
