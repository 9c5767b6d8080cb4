"""Default decoding options of each task: the settings of the paper (section 4 and its appendix)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from blip2.config import Blip2Config
from blip2.errors import OptionError
from blip2.generation import GenerateOptions

CAPTION = GenerateOptions(num_beams=5, max_new_tokens=30, min_new_tokens=1, length_penalty=1.0)
ASK = GenerateOptions(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
CHAT = GenerateOptions(num_beams=1, max_new_tokens=40, min_new_tokens=1)
"""Greedy, since only then an answer can be streamed."""



@dataclass(frozen=True)
class Defaults:
    """A model's default decoding options for each task."""

    caption: GenerateOptions = CAPTION
    ask: GenerateOptions = ASK
    chat: GenerateOptions = CHAT


INSTRUCTED = GenerateOptions(
    num_beams=5, max_new_tokens=256, min_new_tokens=1, length_penalty=1.0, repetition_penalty=1.5
)  # fmt: skip
"""From ``generate`` in the authors' InstructBLIP code: the prompt decides the task and the length."""
INSTRUCT = Defaults(INSTRUCTED, INSTRUCTED, replace(INSTRUCTED, num_beams=1))


def defaults_of(config: Blip2Config) -> Defaults:
    """The defaults of the model's authors."""
    return INSTRUCT if config.reads_prompt else Defaults()


BATCH_SIZE = 16
"""Prompts decoded together; bounds the memory and does not change answers."""

NAMES = tuple(field.name for field in fields(GenerateOptions))


def merged(defaults: GenerateOptions, given: Mapping[str, Any]) -> GenerateOptions:
    """The task's defaults, overridden by the given options.

    Sampling without a number of beams uses none, and more results than beams use as many beams as results. Raises
    OptionError for an unknown option, with the nearest known name.
    """
    for name in given:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(NAMES)}"
            raise OptionError(f"there is no option {name}; {hint}")
    implied: dict[str, Any] = {}
    if "num_beams" not in given:
        if given.get("sample", defaults.sample):
            implied = {"num_beams": 1, "length_penalty": 1.0}
        elif isinstance(number := given.get("num_return"), int) and number > defaults.num_beams:
            implied = {"num_beams": number}
    return replace(defaults, **{**implied, **given})
