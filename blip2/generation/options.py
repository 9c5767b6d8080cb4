"""Decoding options: a frozen dataclass, checked when it is made.

The names are those of Hugging Face's ``GenerationConfig``, except ``sample`` (``do_sample``), ``num_return``
(``num_return_sequences``) and ``stop`` (``stop_strings``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal

from blip2.errors import OptionError, option, setting

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
"""Options that apply only to sampling, with the values that switch them off."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Everything besides the model and the prompt that determines the answer. Lengths count new tokens only."""

    max_new_tokens: int = 30
    """1 or more; the end token counts. The paper's captions stop at 30."""
    min_new_tokens: int = 0
    """0 to max_new_tokens; no end token before that many. Stop strings still end an answer."""
    num_beams: int = 1
    """1 or more; 1 is greedy decoding (or sampling). The paper uses 5 throughout."""
    length_penalty: float = 1.0
    """Any finite number; a beam's score is its log-probability / (new tokens ** length_penalty), so more than 0
    favours long answers, less than 0 short ones (the paper: 1 for captions, -1 for answers). Beams only."""
    early_stopping: bool | Literal["never"] = False
    """When beams stop. True: as soon as num_beams texts have ended. False: when the best open beam, at its present
    length, cannot beat the worst ended text. "never": when it could not at any length. Beams only."""
    num_return: int = 1
    """1 or more: the n best beams, or n samples of the same prompt."""
    sample: bool = False
    """Draw each token from its distribution instead of taking the most likely one."""
    temperature: float = 1.0
    """More than 0; divides the logits: below 1 sharpens, above 1 flattens. Sampling only."""
    top_k: int = 0
    """0 (off) or more; only the k most likely tokens are drawn. Sampling only. (Fan et al., 2018)"""
    top_p: float = 1.0
    """More than 0, up to 1 (off); only the most likely tokens that together have this probability are drawn.
    Sampling only. (Holtzman et al., 2020)"""
    min_p: float = 0.0
    """0 (off) to 1; only tokens at least this many times as likely as the most likely one are drawn. Sampling only.
    (Nguyen et al., 2024)"""
    typical_p: float = 1.0
    """More than 0, up to 1 (off); only the tokens closest to the expected surprise that together have this
    probability are drawn. Sampling only. (Meister et al., 2022)"""
    repetition_penalty: float = 1.0
    """More than 0; above 1 makes tokens that the answer already has less likely. (Keskar et al., 2019)"""
    no_repeat_ngram_size: int = 0
    """0 (off) or more; no run of that many tokens comes twice in an answer. (Paulus et al., 2018)"""
    stop: tuple[str, ...] | list[str] | str = ()
    """Texts that end an answer, or one text; they are not part of the answer. They work with beams too. Kept as a
    tuple."""
    seed: int | None = None
    """0 to 2**63 - 1. With a seed, an answer depends only on its prompt and the options, not on its place in a batch
    (so equal prompts get equal samples; num_return gives different ones). None: different every time."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, value in vars(self).items():
            if isinstance(value, Number) and not isinstance(value, int | float):  # such as NumPy's
                object.__setattr__(self, name, value.item() if hasattr(value, "item") else value)
        for name, (is_allowed, allowed, remedy) in _ALLOWED.items():
            value = getattr(self, name)
            if not is_allowed(value):
                raise OptionError(f"{option(name)} is {_shown(value)}; it may be {allowed}; {remedy}")
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"{option('min_new_tokens')} is {self.min_new_tokens}, but {option('max_new_tokens')} only "
                f"{self.max_new_tokens}; raise the latter"
            )
        if self.sample and self.num_beams > 1:
            raise OptionError(
                f"{option('sample')} needs {option('num_beams')}=1, not {self.num_beams}: beam search looks for the "
                f"most likely text; {setting('num_beams', 1)}, or {setting('sample', False)}"
            )
        if not self.sample and self.num_return > self.num_beams:
            raise OptionError(
                f"{option('num_return')} is {self.num_return}, but {self.num_beams} beam(s) give only that many "
                f"answers; {setting('num_beams', self.num_return)} or more, or {setting('sample', True)}"
            )
        for name, unused in SAMPLING.items():
            if not self.sample and getattr(self, name) != unused:
                raise OptionError(
                    f"{option(name)} is {getattr(self, name)}, but sampling is off; {setting('sample', True)}"
                )


def _shown(value: object) -> str:
    """A value as quoted in a message; texts one by one."""
    if isinstance(value, tuple) and value and all(isinstance(text, str) for text in value):
        return ", ".join(map(repr, value))
    return repr(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_int(value) and value >= least


# For each option: the check, the allowed values as text, and the remedy.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "max_new_tokens": (_at_least(1), "a whole number, 1 or more", "30 is enough for a caption"),
    "min_new_tokens": (_at_least(0), "a whole number, 0 or more", "0 sets no minimum"),
    "num_beams": (_at_least(1), "a whole number, 1 or more", "1 decodes without beams"),
    "length_penalty": (_is_number, "any finite number", "above 0 favours long answers, below 0 short ones"),
    "early_stopping": (
        lambda value: isinstance(value, bool) or value == "never",
        'True, False or "never"',
        "False is the usual choice",
    ),
    "num_return": (_at_least(1), "a whole number, 1 or more", "1 returns the best answer"),
    "sample": (lambda value: isinstance(value, bool), "True or False", "False takes the most likely token"),
    "temperature": (
        lambda value: _is_number(value) and value > 0,
        "a finite number above 0",
        f"for the most likely text leave it out, and {setting('sample', False)}",
    ),
    "top_k": (_at_least(0), "a whole number, 0 or more", "0 switches it off"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "above 0 and up to 1", "1 switches it off"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "0 to 1", "0 switches it off"),
    "typical_p": (lambda value: _is_number(value) and 0 < value <= 1, "above 0 and up to 1", "1 switches it off"),
    "repetition_penalty": (
        lambda value: _is_number(value) and value > 0,
        "a finite number above 0",
        "1 switches it off",
    ),
    "no_repeat_ngram_size": (_at_least(0), "a whole number, 0 or more", "0 switches it off"),
    "stop": (
        lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
        "one text or several, none of them empty",
        f"leave out {option('stop')} to end where the model ends",
    ),
    "seed": (
        lambda value: value is None or (_is_int(value) and 0 <= value < 2**63),
        "a whole number from 0 to 2^63 - 1",
        f"{setting('seed', None)} for different samples each time",
    ),
}
