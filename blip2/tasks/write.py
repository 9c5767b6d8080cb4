"""Captions from the Q-Former alone, as trained in stage 1 (ITG), without a language model.

B rows, P patches, Q query tokens, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.model import Blip2Matcher
from blip2.qformer import Memory, QFormerOutput


@dataclass
class Writing:
    """Each row's query tokens after seeing the image, and its text so far, ``int64[B, T]``."""

    memory: Memory
    text_BT: Tensor

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row named twice is copied."""
        self.memory = [(key[rows_N], value[rows_N]) for key, value in self.memory]
        self.text_BT = self.text_BT[rows_N]

    def forget(self) -> None:
        """Frees finished rows."""

    def join(self, other: Writing) -> None:
        raise NotImplementedError("captions of the Q-Former start together")


class QFormerWriter:
    """A matching model with the interface of a language model (`language.LanguageModel`); its prompts are patches.

    The text is processed again from its beginning for each token; captions are short.
    """

    def __init__(self, model: Blip2Matcher) -> None:
        self._model = model

    def embed(self, tokens_BT: Tensor) -> Tensor:
        raise NotImplementedError("the prompt is an image only")

    def prefill(self, patches_BPD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, Writing]:
        """The logits of each caption's first token ``float[B, V]``; the text begins with [DEC]."""
        seen = self._model.qformer(image_BPD=patches_BPD)
        start_B1 = torch.full((len(patches_BPD), 1), self._model.config.bos_token_id, device=patches_BPD.device)
        state = Writing(seen.memory, start_B1)
        return self._logits(state), state

    def step(self, tokens_B: Tensor, state: Writing) -> Tensor:
        """One more token for each row; the logits of the next, ``float[B, V]``."""
        state.text_BT = torch.cat([state.text_BT, tokens_B[:, None]], dim=1)
        return self._logits(state)

    def _logits(self, state: Writing) -> Tensor:
        is_real_BT = torch.ones_like(state.text_BT, dtype=torch.bool)
        seen = QFormerOutput(torch.empty(0), state.memory)
        return self._model.caption_logits(state.text_BT, is_real_BT, seen)[:, -1]
