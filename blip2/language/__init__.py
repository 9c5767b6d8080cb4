"""The frozen language models, with a common protocol.

A prompt is a sequence of vectors, query tokens of an image or embedded tokens, so nothing here knows about images.
Prompts of different lengths are right-padded to one tensor with their ``lengths_B``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from blip2.config import LanguageConfig, OPTConfig, T5Config
from blip2.language.decoder import Decoder
from blip2.language.opt import OPT
from blip2.language.t5 import T5

__all__ = [
    "OPT", "T5", "Decoder", "DecoderState", "Language", "LanguageModel", "Resident", "build_language_model", "pad_rows",
]  # fmt: skip

Language = OPT | T5 | Decoder


class DecoderState(Protocol):
    """The state of decoding; one row for each sequence."""

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row that is named twice is copied (a beam that splits)."""

    def forget(self) -> None:
        """Clear the memory of removed rows: it may be NaN, which must not spread."""

    def join(self, other: Any) -> None:
        """Append the rows of another state of the same language model."""


class Resident(DecoderState, Protocol):
    """A state that can move into fixed memory, for recorded steps (`blip2.generation.replay`); see
    `blip2.layers.KVCache`. All states of a `Language` can."""

    @property
    def device(self) -> torch.device:
        """Device of its tokens."""

    @property
    def num_bytes(self) -> int:
        """Approximate size of a fixed state of its `fixed_sizes`."""

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        """Its sizes, rounded up: states with equal values fit into the same fixed one."""

    def fixed(self) -> Any:
        """An empty fixed state of this one's `fixed_sizes`; a step only changes its memory in place."""

    def settle(self, home: Any) -> None:
        """Move into the first rows of a fixed state."""

    def is_view_of(self, home: Any) -> bool:
        """Whether it is still a view of ``home``: settled there, without rows selected or joined since."""

    def count_step(self) -> None:
        """Account for a recorded step, which has appended a token to each row of the fixed state behind this one."""


class LanguageModel(Protocol):
    """What decoding (`blip2.generation`) needs from a language model; each `Language` is one."""

    def embed(self, tokens_BT: Tensor, /) -> Tensor:
        """``int[B, T]`` token ids to ``float[B, T, D]``."""

    def prefill(self, prompt_BTD: Tensor, lengths_B: Tensor, num_new_tokens: int, /) -> tuple[Tensor, DecoderState]:
        """Read prompts; returns the logits of each row's first new token ``float[B, V]``, and a state with space for
        more."""

    def step(self, tokens_B: Tensor, state: Any, /) -> Tensor:
        """Append one token to every row of a state from `prefill`; returns the logits of the next one ``float[B,
        V]``."""


def build_language_model(config: LanguageConfig) -> Language:
    """An untrained language model of the configured family."""
    if isinstance(config, OPTConfig):
        return OPT(config)
    return T5(config) if isinstance(config, T5Config) else Decoder(config)


def pad_rows(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts ``float[T_i, D]`` of different lengths to one right-padded ``float[B, T, D]`` and ``lengths_B``."""
    lengths_B = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths_B
