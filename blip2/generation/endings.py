"""When an answer ends, and which of its tokens belong to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from blip2.errors import OptionError, option
from blip2.generation.options import GenerateOptions

FinishReason = Literal["eos", "length", "stop"]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One answer to one prompt."""

    tokens: list[int]
    """New tokens only, without the end token or a stop string."""
    score: float
    """Greedy and sampling: the sum of the log-probabilities of all chosen tokens (including end token and stop string)
    from the model, before any filter. Beam search: the sum of the filtered scores, divided by (number of those tokens
    ** length_penalty), like Hugging Face's ``sequences_scores``."""
    finish_reason: FinishReason
    """"eos": an end token; "stop": a stop string; "length": max_new_tokens were reached."""
    log_probs: list[float] | None = None
    """Greedy and sampling: log-probability of each of ``tokens`` from the model, before any filter. None with beams."""
    top: list[dict[int, float]] | None = None
    """For each of ``tokens``, the most likely tokens at its place with their log-probabilities, if requested."""


class Endings:
    """End tokens, stop strings and the maximum length, in this order of precedence."""

    def __init__(self, options: GenerateOptions, eos_token_ids: Sequence[int], decode: Decode | None) -> None:
        if options.stop and decode is None:
            raise OptionError(
                f"{option('stop')} is {options.stop!r}, but this engine cannot decode text; create it with decode=..., "
                "or use no stop"
            )
        self.eos_token_ids = frozenset(eos_token_ids)
        self.stop = tuple(options.stop)
        self.max_new_tokens = options.max_new_tokens
        self._decode = decode

    def reason(self, tokens: list[int]) -> FinishReason | None:
        """Why an answer ends with its last token; None if it continues."""
        if tokens[-1] in self.eos_token_ids:
            return "eos"
        if self._find(tokens) is not None:
            return "stop"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def cut(self, tokens: list[int], reason: FinishReason) -> list[int]:
        """The tokens that belong to the answer: without the end token or the stop string."""
        if reason == "eos":
            return tokens[:-1]
        if reason == "stop":
            position = self._find(tokens)
            assert position is not None
            return tokens[: self._fitting(tokens, position)]
        return tokens

    def num_certain(self, tokens: list[int]) -> int:
        """How many tokens of a running answer are final: those before a text that may become a stop string."""
        if not self.stop:
            return len(tokens)
        text = self._text(tokens)
        pending = max(
            size for stop in self.stop for size in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:size])
        )
        return self._fitting(tokens, len(text) - pending)

    def _text(self, tokens: list[int]) -> str:
        assert self._decode is not None
        return self._decode(tokens)

    def _find(self, tokens: list[int]) -> int | None:
        """The position of the first stop string in the text."""
        if not self.stop:
            return None
        text = self._text(tokens)
        return min((found for stop in self.stop if (found := text.find(stop)) >= 0), default=None)

    def _fitting(self, tokens: list[int], num_characters: int) -> int:
        """How many of the first tokens decode to at most this many characters."""
        count = len(tokens)
        while count and len(self._text(tokens[:count])) > num_characters:
            count -= 1
        return count
