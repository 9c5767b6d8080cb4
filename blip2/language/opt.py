"""OPT (Zhang et al., 2022): a decoder-only language model, pre-norm, ReLU, learned positions.

B rows, T tokens of this call, S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import OPTConfig
from blip2.language.decoding import placed, prefill, step
from blip2.language.stepping import as_plane, program_for, run
from blip2.layers import KVCache, attend, split_parts
from blip2.linear import Linear, Table
from blip2.native.program import Planes, Program, X

POSITION_OFFSET = 2  # the first two rows of OPT's position table are never used


class Block(nn.Module):
    def __init__(self, *, width: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = self.attention_dropout = 0.0  # for training the language model; here it is frozen
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.fc1 = Linear(width, intermediate_size)
        self.fc2 = Linear(intermediate_size, width)

    def forward(
        self, x_BTD: Tensor, *, layer: int, cache: KVCache | None, positions_BT: Tensor, mask: Tensor | None
    ) -> Tensor:
        query, key, value = split_parts(self.qkv(self.attention_norm(x_BTD)), 3, self.num_heads)
        if cache is not None:
            key, value = cache.write(layer, key, value, positions_BT)
        dropout = self.attention_dropout if self.training else 0.0
        attended = self.output(attend(query, key, value, mask=mask, is_causal=mask is None, dropout=dropout))
        x_BTD = x_BTD + F.dropout(attended, self.dropout, self.training)
        return x_BTD + F.dropout(self.fc2(F.relu(self.fc1(self.feed_forward_norm(x_BTD)))), self.dropout, self.training)

    def write_step(self, program: Program, planes: Planes) -> None:
        """`forward` for one token of each row, as a program."""
        heads, width = self.num_heads, self.output.in_features
        size = width // heads
        normed = program.buffer("normed", width)
        program.norm(self.attention_norm, X, normed)
        parts = program.linear(self.qkv, normed, "heads")
        program.write(parts, planes, firsts=(width, 2 * width), stride=size, heads=heads, size=size)
        attended = program.attend(parts, "attended", planes, stride=size, heads=heads, size=size)
        program.add(program.linear(self.output, attended, "output"), X)
        program.norm(self.feed_forward_norm, X, normed)
        hidden = program.activate("relu", program.linear(self.fc1, normed, "inner"), "hidden", is_gated=False)
        program.add(program.linear(self.fc2, hidden, "output"), X)


class OPT(nn.Module):
    """For the protocol see `blip2.language`; a prompt is the beginning of the text."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        padding = config.pad_token_id if 0 <= config.pad_token_id < config.vocab_size else None  # not trained
        self.token_embedding = Table(config.vocab_size, config.hidden_size, padding)
        self.position_embedding = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(width=config.hidden_size, num_heads=config.num_heads, intermediate_size=config.intermediate_size)
            for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.output: nn.Module | None = None
        """A quantised copy of the embeddings as output layer; without it the embeddings themselves are used (tied)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation; the embeddings may have a lower precision."""
        return self.final_norm.weight.dtype

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """``int[B, T]`` to ``float[B, T, D]``, without positions."""
        return self.token_embedding(tokens_BT).to(self.dtype)

    def forward(
        self,
        embeddings_BTD: Tensor,
        cache: KVCache | None = None,
        *,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``float[B, T, D]`` after the final norm; each token attends to those before it in its row.

        With a cache the tokens continue the cached rows. Rows of different lengths are right-padded by the caller.
        ``positions_BT`` and ``mask`` bool[B, 1, T, T] (without a cache) override this: training packs several texts
        behind one prefix.
        """
        positions_BT, mask = placed(embeddings_BTD, cache, positions_BT, mask)
        x_BTD = embeddings_BTD + self.position_embedding(positions_BT + POSITION_OFFSET).to(embeddings_BTD.dtype)
        if (program := program_for(x_BTD, cache, self.blocks, self._write_step)) is not None:
            assert cache is not None and mask is not None
            return self.final_norm(run(program, x_BTD, positions_BT, [as_plane(mask), *cache.planes()]))
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, layer=layer, cache=cache, positions_BT=positions_BT, mask=mask)
        return self.final_norm(x_BTD)

    def _write_step(self, program: Program) -> None:
        for layer, block in enumerate(self.blocks):
            block.write_step(program, Planes(mask=0, keys=1 + 2 * layer, values=2 + 2 * layer))  # type: ignore[operator]

    def logits(self, hidden: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., V]``; the output layer is tied to the embeddings."""
        if self.output is not None:
            return self.output(hidden)
        return self.token_embedding.scores(hidden.to(self.token_embedding.weight.dtype))

    def prefill(self, prompt_BTD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Read right-padded prompts; returns the logits of each row's next token ``float[B, V]``, and the state."""
        return prefill(self, prompt_BTD, lengths_B, num_new_tokens)

    def step(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every row; returns the logits of the next one, ``float[B, V]``."""
        return step(self, tokens_B, cache)
