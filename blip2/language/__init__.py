"""The frozen language models, behind one protocol: several makes, and one way to talk to any.

A prompt is a sequence of vectors, image queries and embedded words alike, so nothing here knows about pictures.
Prompts of mixed length are right-padded to one tensor with their ``lengths_B``.
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
    """What decoding goes on from; one row a sequence."""

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row named twice is copied (a beam that splits)."""

    def forget(self) -> None:
        """Let go of what rows have left behind that are gone: it may be NaN, and must not reach others."""

    def join(self, other: Any) -> None:
        """Take in the rows of another state of the same language model, after those here."""


class Resident(DecoderState, Protocol):
    """A state that can move into memory which stays where it is, for steps that are recorded
    (`blip2.generation.replay`); see `blip2.layers.KVCache`. Those of every `Language` are."""

    @property
    def device(self) -> torch.device:
        """Of its tokens."""

    @property
    def num_bytes(self) -> int:
        """That a fixed state of its room takes, about."""

    @property
    def room(self) -> tuple[int, ...]:
        """Its sizes, rounded up: states of equal room fit into the same fixed one."""

    def fixed(self) -> Any:
        """An empty state of this one's room, whose memory stays where it is; a step changes nothing else."""

    def settle(self, home: Any) -> None:
        """Move into the first rows of a fixed state."""

    def lives_in(self, home: Any) -> bool:
        """Whether it has been there since it settled, and no rows were chosen or joined."""

    def count_step(self) -> None:
        """A recorded step has appended a token to each row of the fixed state in which this one lives."""


class LanguageModel(Protocol):
    """What the decoder (`blip2.generation`) needs of a language model; each `Language` is one."""

    def embed(self, tokens_BT: Tensor, /) -> Tensor:
        """``int[B, T]`` token ids to ``float[B, T, D]``."""

    def prefill(self, prompt_BTD: Tensor, lengths_B: Tensor, num_new_tokens: int, /) -> tuple[Tensor, DecoderState]:
        """Read prompts; the logits of each row's first new token ``float[B, V]``, and a state with room for more."""

    def step(self, tokens_B: Tensor, state: Any, /) -> Tensor:
        """Append one token to every row of a state that `prefill` gave; the logits of the next ``float[B, V]``."""


def build_language_model(config: LanguageConfig) -> Language:
    """An untrained language model of the configured family."""
    if isinstance(config, OPTConfig):
        return OPT(config)
    return T5(config) if isinstance(config, T5Config) else Decoder(config)


def pad_rows(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts ``float[T_i, D]`` of mixed length to one right-padded ``float[B, T, D]`` and ``lengths_B``."""
    lengths_B = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths_B
