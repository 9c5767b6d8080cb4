"""Checks regular expressions given by users: that they are valid, and that they do not run forever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from blip2.errors import OptionError, option

MAX_S = 5.0
LENGTH = 240
"""Length in characters of the texts that a pattern is tried on; captions are not longer."""

TRY = """
import json, re, sys
for number, (pattern, texts) in enumerate(json.load(sys.stdin)):
    print(number, flush=True)
    for text in texts:
        re.sub(pattern, "", text)
print("end")
"""


def check_patterns(patterns: Sequence[str]) -> None:
    """Raises OptionError for an invalid regular expression, and for one that takes too long on a repetition of its own
    characters: `(a+)+b` would take years."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise OptionError(f"{option('remove')} is {pattern!r}, an invalid regular expression: {error}") from None
        if not pattern:
            raise OptionError(f"{option('remove')} is empty; give a regular expression, or leave it out")
    trials = [(pattern, _texts(pattern)) for pattern in patterns if re.search(r"[*+{]", pattern)]
    if not trials or not sys.executable:
        return
    # In a separate process: a running match cannot be interrupted.
    command = [sys.executable, "-I", "-S", "-c", TRY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            child.communicate(json.dumps(trials), timeout=MAX_S)
        except subprocess.TimeoutExpired:
            child.kill()
            reached = child.communicate()[0].split()
            pattern = trials[int(reached[-1]) if reached and reached[-1].isdigit() else 0][0]
            raise OptionError(
                f"{option('remove')} is {pattern!r}, which takes too long on some texts; rewrite it without repeats "
                "within repeats, such as (a+)+"
            ) from None


def _texts(pattern: str) -> list[str]:
    """Texts that a pattern matches in many ways, but not completely."""
    letters = dict.fromkeys([*"a0 _,.", *(character for character in pattern if character.isalnum())])
    words = dict.fromkeys(re.findall(r"\w+", pattern))
    parts = [*letters, *words, *(f"{word} " for word in [*letters, *words]), *(f" {word}" for word in letters)]
    return [part * (LENGTH // len(part) + 1) + end for part in dict.fromkeys(parts) for end in ("\x00", "!", " ")]
