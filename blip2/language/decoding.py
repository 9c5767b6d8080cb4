"""Prefill and steps of decoder-only language models, where the prompt is the beginning of the text.

B rows, T tokens of this call, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blip2.config import DecoderConfig, OPTConfig
from blip2.errors import OptionError, option
from blip2.layers import KVCache


class DecoderOnly(Protocol):
    """The interface of a decoder-only model; called with prompts and a cache, it returns the hidden states after the
    final norm."""

    blocks: nn.ModuleList
    __call__: Callable[..., Any]

    @property
    def config(self) -> OPTConfig | DecoderConfig: ...

    def embed(self, tokens_BT: Tensor, /) -> Tensor:
        """``int[B, T]`` to ``float[B, T, D]``."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """``float[..., D]`` to ``float[..., V]``."""


def prefill(model: DecoderOnly, prompt_BTD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, KVCache]:
    """See `blip2.language.LanguageModel.prefill`. Raises OptionError for more tokens than the model has positions."""
    rows, longest, _ = prompt_BTD.shape
    config = model.config
    if longest + num_new_tokens > config.max_position_embeddings:
        raise OptionError(
            f"a prompt of {longest} tokens with {num_new_tokens} new ones does not fit this language model, which "
            f"reads {config.max_position_embeddings}; shorten the prompt, or lower {option('max_new_tokens')}"
        )
    cache = KVCache(
        model.blocks,
        rows=rows,
        num_heads=config.num_key_value_heads,
        capacity=longest + num_new_tokens,
        head_size=config.head_size,
        device=prompt_BTD.device,
        dtype=prompt_BTD.dtype,
    )
    hidden_BTD = model(prompt_BTD, cache)
    cache.advance(lengths_B, longest)
    last_BD = hidden_BTD[torch.arange(rows, device=lengths_B.device), lengths_B - 1]
    return model.logits(last_BD), cache


def step(model: DecoderOnly, tokens_B: Tensor, cache: KVCache) -> Tensor:
    """See `blip2.language.LanguageModel.step`."""
    hidden_B1D = model(model.embed(tokens_B[:, None]), cache)
    cache.advance(1, 1)
    return model.logits(hidden_B1D[:, 0])


def placed(
    embeddings_BTD: Tensor, cache: KVCache | None, positions_BT: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Positions of tokens, and their mask: after those in the cache; without one as given, or from 0 on."""
    num_tokens = embeddings_BTD.shape[1]
    if cache is not None:
        positions_BT = cache.positions(num_tokens)
        return positions_BT, cache.mask(positions_BT)
    if positions_BT is None:
        positions_BT = torch.arange(num_tokens, device=embeddings_BTD.device)[None]
    return positions_BT, mask
