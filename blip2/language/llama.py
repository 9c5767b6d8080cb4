"""Decoders of the Llama make (Touvron et al., 2023): Llama, Mistral, Qwen, SmolLM, Gemma, Phi, Granite.

Pre-norm by root mean square, positions that turn queries and keys (Su et al., 2021), heads of queries that share keys
and values (Ainslie et al., 2023), gated feed-forward layers. What one family has and another has not is said by
`DecoderConfig`.

B rows, T tokens of this call, S tokens so far, D width, H heads of queries, K of keys, R turned numbers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache as remembered
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import DecoderConfig, Rotary
from blip2.language.decoding import prefill, step
from blip2.language.norm import RMSNorm
from blip2.layers import KVCache, attend
from blip2.linear import Linear, Table

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
}  # fmt: skip


class Turn(NamedTuple):
    """Cosine and sine of each token's angles, ``float[B, 1, T, R]``; the sines of the first half are negative."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        """Number i of a head and number i + R / 2 are a point in the plane, which is turned."""
        size = self.cos.shape[-1]
        turned, rest = x_BHTD[..., :size], x_BHTD[..., size:]
        turned = turned * self.cos + turned.roll(size // 2, -1) * self.sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


@remembered
def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """By how much each next token turns further, in radians: ``float32[R / 2]``."""
    with torch.inference_mode(False):
        exponents = torch.arange(0, rotary.size, 2, dtype=torch.float32) / rotary.size
        plain = 1 / rotary.base**exponents
        return _stretched(plain, rotary).to(device)


def _stretched(plain: Tensor, rotary: Rotary) -> Tensor:
    factor, length = rotary.factor, rotary.original_length
    if rotary.scaling == "linear":
        return plain / factor
    if rotary.scaling == "longrope":
        return plain / torch.tensor(rotary.factors)
    if rotary.scaling == "llama3":  # by how often a number turns within the original length
        share = (length * plain / (2 * math.pi) - rotary.slow) / (rotary.fast - rotary.slow)
    elif rotary.scaling == "yarn":  # (Peng et al., 2023): by a ramp over the numbers
        places = [
            rotary.size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))
            for turns in (rotary.fast, rotary.slow)
        ]
        first, last = (math.floor(places[0]), math.ceil(places[1])) if rotary.is_rounded else places
        first, last = max(first, 0), min(last, rotary.size - 1)
        share = 1 - (torch.arange(len(plain)) - first) / (last - first if last != first else 0.001)
    else:
        return plain
    share = share.clamp(0, 1)
    return (1 - share) * plain / factor + share * plain


def turns(rotary: Rotary, positions_BT: Tensor, dtype: torch.dtype) -> Turn:
    """For tokens at these positions."""
    angles_BTR = positions_BT[..., None].float() * frequencies(rotary, positions_BT.device)
    cos, sin = angles_BTR.cos() * rotary.amplitude, angles_BTR.sin() * rotary.amplitude
    return Turn(*(torch.cat(halves, -1)[:, None].to(dtype) for halves in ((cos, cos), (-sin, sin))))


class View(NamedTuple):
    """What a layer's attention needs to know of the tokens: who sees whom (None: all those before), and where they
    are (None: it is not told)."""

    mask: Tensor | None
    turn: Turn | None


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_size
        self.num_heads = config.num_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.attention_scale = config.attention_scale
        self.attention_cap = config.attention_cap
        self.residual_scale = config.residual_scale
        self.activation = ACTIVATIONS[config.activation]
        norm = partial(RMSNorm, eps=config.norm_eps, offset=config.norm_offset)
        self.attention_norm = norm(width)
        num_heads = config.num_heads + 2 * config.num_key_value_heads
        self.qkv = Linear(width, num_heads * size, config.has_qkv_bias)
        self.query_norm, self.key_norm = (norm(size) if config.has_head_norms else None for _ in range(2))
        self.output = Linear(config.num_heads * size, width, config.has_output_bias)
        self.attention_post_norm = norm(width) if config.has_post_norms else None
        self.feed_forward_norm = norm(width)
        self.gate_up = Linear(width, 2 * config.intermediate_size, config.has_feed_forward_bias)
        self.down = Linear(config.intermediate_size, width, config.has_feed_forward_bias)
        self.feed_forward_post_norm = norm(width) if config.has_post_norms else None

    def forward(self, x_BTD: Tensor, *, layer: int, cache: KVCache | None, positions_BT: Tensor, view: View) -> Tensor:
        heads = self.num_heads, self.num_key_value_heads
        parts = self.qkv(self.attention_norm(x_BTD)).unflatten(-1, (heads[0] + 2 * heads[1], -1)).transpose(1, 2)
        queries_keys, value = parts.split((sum(heads), heads[1]), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = queries_keys.split(heads, dim=1)
            queries_keys = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        if view.turn is not None:
            queries_keys = view.turn(queries_keys)
        query, key = queries_keys.split(heads, dim=1)
        if cache is not None:
            key, value = cache.write(layer, key, value, positions_BT)
        attended_BTD = attend(
            query, key, value, mask=view.mask, is_causal=view.mask is None, scale=self.attention_scale,
            cap=self.attention_cap,
        )  # fmt: skip
        x_BTD = self._added(x_BTD, self.output(attended_BTD), self.attention_post_norm)
        gate, up = self.gate_up(self.feed_forward_norm(x_BTD)).chunk(2, dim=-1)
        return self._added(x_BTD, self.down(self.activation(gate) * up), self.feed_forward_post_norm)

    def _added(self, x_BTD: Tensor, said_BTD: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is not None:
            said_BTD = norm(said_BTD)
        return x_BTD + (said_BTD if self.residual_scale == 1 else said_BTD * self.residual_scale)


class Decoder(nn.Module):
    """See `blip2.language` for what a language model offers; here a prompt is simply the start of the text."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        table = Table if config.is_tied else nn.Embedding
        self.token_embedding = table(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.output: nn.Module | None = None
        """Where the table of tokens is the head: that, quantised, beside the table, or None."""
        if not config.is_tied:
            self.output = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in; the tables may be kept in less."""
        return self.final_norm.weight.dtype

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """``int[B, T]`` to ``float[B, T, D]``."""
        embedded_BTD = self.token_embedding(tokens_BT).to(self.dtype)
        if self.config.embedding_scale == 1:
            return embedded_BTD
        # Rounded as Gemma was trained: the root of 3072 is 55.5 in bfloat16.
        return embedded_BTD * float(torch.tensor(self.config.embedding_scale, dtype=self.dtype))

    def forward(
        self,
        embeddings_BTD: Tensor,
        cache: KVCache | None = None,
        *,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``float[B, T, D]`` after the final norm; each token sees those before it in its row.

        With a cache the tokens continue the cached rows. Rows of mixed length are right-padded by the caller.
        ``positions_BT`` and ``mask`` bool[B, 1, T, T] (without a cache) say otherwise: training packs several
        texts behind one prefix.
        """
        num_tokens = embeddings_BTD.shape[1]
        if cache is not None:
            positions_BT = cache.positions(num_tokens)
            mask = cache.mask(positions_BT)
        elif positions_BT is None:
            positions_BT = torch.arange(num_tokens, device=embeddings_BTD.device)[None]
        views = self._views(positions_BT, mask, cache is not None, embeddings_BTD.dtype)
        x_BTD = embeddings_BTD if self.config.input_scale == 1 else embeddings_BTD * self.config.input_scale
        for layer, (block, view) in enumerate(zip(self.blocks, views, strict=True)):
            x_BTD = block(x_BTD, layer=layer, cache=cache, positions_BT=positions_BT, view=view)
        return self.final_norm(x_BTD)

    def _views(self, positions_BT: Tensor, mask: Tensor | None, is_cached: bool, dtype: torch.dtype) -> list[View]:
        """Of each layer."""
        config = self.config
        layers = range(config.num_layers)
        turn = near_turn = turns(config.rotary, positions_BT, dtype)
        near_mask = mask
        if any(config.window_layers):
            if config.window_rotary is not None:
                near_turn = turns(config.window_rotary, positions_BT, dtype)
            near_mask = self._windowed(positions_BT, mask, is_cached)
        unturned = config.unturned_layers or [False] * len(layers)
        views = [
            View(near_mask, near_turn) if is_near else View(mask, turn)
            for is_near in config.window_layers or [False] * len(layers)
        ]
        return [
            view._replace(turn=None) if is_unturned else view for view, is_unturned in zip(views, unturned, strict=True)
        ]

    def _windowed(self, positions_BT: Tensor, mask: Tensor | None, is_cached: bool) -> Tensor | None:
        """The mask of a layer that sees the last tokens only."""
        window = self.config.window
        num_keys = positions_BT.shape[1] if mask is None else mask.shape[-1]
        assert window is not None
        if num_keys <= window:
            return mask
        keys_BS = torch.arange(num_keys, device=positions_BT.device)[None] if is_cached else positions_BT
        is_near_B1TS = (keys_BS[:, None] > positions_BT[..., None] - window)[:, None]
        return is_near_B1TS & (is_near_B1TS.new_ones(num_keys, num_keys).tril() if mask is None else mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., V]``."""
        if self.output is not None:
            scores = self.output(hidden)
        else:
            assert isinstance(self.token_embedding, Table)
            scores = self.token_embedding.scores(hidden.to(self.token_embedding.weight.dtype))
        if self.config.logit_scale != 1:
            scores = scores * self.config.logit_scale
        cap = self.config.logit_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def prefill(self, prompt_BTD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Read right-padded prompts; the logits of each row's next token ``float[B, V]``, and the state to go on."""
        return prefill(self, prompt_BTD, lengths_B, num_new_tokens)

    def step(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every row; the logits of the next one, ``float[B, V]``."""
        return step(self, tokens_B, cache)
