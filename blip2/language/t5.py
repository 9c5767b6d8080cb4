"""T5 as Flan-T5 has it (Raffel et al., 2020; version 1.1): an encoder-decoder with gated feed-forward layers.

Root-mean-square norms without bias, relative positions as a learned bias of the attention scores (no other
positions, no scaling of the scores), and an output table of its own.

B rows, P prompt tokens, T new tokens of the decoder, S its tokens so far, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import T5Config
from blip2.language.float16 import never_in_float16
from blip2.language.norm import RMSNorm
from blip2.layers import KVCache, attend, fixed_like, rounded_up, settle, split_heads, split_parts
from blip2.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh")}


class RelativePositionBias(nn.Module):
    """A bias for each head and each bucket of distances: near ones each their own, far ones share by logarithm."""

    def __init__(self, *, num_buckets: int, max_distance: int, num_heads: int, is_bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.is_bidirectional = is_bidirectional
        self.table = nn.Embedding(num_buckets, num_heads)

    def buckets(self, distance: Tensor) -> Tensor:
        """``key position - query position`` to bucket numbers, of the same shape."""
        num_buckets = self.num_buckets
        offset = torch.zeros_like(distance)
        if self.is_bidirectional:
            num_buckets //= 2
            offset = (distance > 0) * num_buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        num_exact = num_buckets // 2
        far = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(self.max_distance / num_exact)
        far = (num_exact + (far * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
        return offset + torch.where(distance < num_exact, distance, far)

    def forward(self, query_positions: Tensor, key_positions_S: Tensor) -> Tensor:
        """``int[..., T]`` and ``int[S]`` to ``float[..., H, T, S]``."""
        distance = key_positions_S - query_positions[..., None]
        return self.table(self.buckets(distance)).movedim(-1, -3)


class SelfAttention(nn.Module):
    """Pre-norm attention without biases, one product for q, k and v; scores are not scaled."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.dropout = 0.0  # for who trains the language model; here it is frozen
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.qkv = Linear(config.hidden_size, 3 * inner, bias=False)
        self.output = Linear(inner, config.hidden_size, bias=False)

    def heads(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, ``float[B, H, T, head size]`` each."""
        return split_parts(self.qkv(self.norm(x_BTD)), 3, self.num_heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attended = self.output(attend(query, key, value, mask=bias, scale=1.0, dropout=dropout))
        return F.dropout(attended, dropout, self.training)


class CrossAttention(nn.Module):
    """The decoder's look at the prompt; otherwise as `SelfAttention`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.dropout = 0.0  # for who trains the language model; here it is frozen
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.query = Linear(config.hidden_size, inner, bias=False)
        self.key_value = Linear(config.hidden_size, 2 * inner, bias=False)
        self.output = Linear(inner, config.hidden_size, bias=False)

    def keys_values(self, encoded_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """What there is to look at, ``float[B, H, P, head size]`` twice; the same for every token that is decoded."""
        key, value = split_parts(self.key_value(encoded_BPD), 2, self.num_heads)
        return key, value

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        query = split_heads(self.query(self.norm(x_BTD)), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        attended = self.output(attend(query, *keys_values, mask=mask, scale=1.0, dropout=dropout))
        return F.dropout(attended, dropout, self.training)


class GatedFeedForward(nn.Module):
    """One product for the gate and what it lets through."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = 0.0
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        hidden = F.dropout(self.activation(gate) * up, self.dropout, self.training)
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class EncoderBlock(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.feed_forward = GatedFeedForward(config)

    def forward(self, x_BPD: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.self_attention.heads(x_BPD)
        return self.feed_forward(x_BPD + self.self_attention.attend(query, key, value, bias))


class DecoderBlock(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.feed_forward = GatedFeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        layer: int,
        cache: KVCache | None,
        positions_BT: Tensor,
        bias: Tensor,
        encoded: tuple[Tensor, Tensor],
        encoded_mask: Tensor,
    ) -> Tensor:
        query, key, value = self.self_attention.heads(x_BTD)
        if cache is not None:
            key, value = cache.write(layer, key, value, positions_BT)
        x_BTD = x_BTD + self.self_attention.attend(query, key, value, bias)
        x_BTD = x_BTD + self.cross_attention(x_BTD, encoded, encoded_mask)
        return self.feed_forward(x_BTD)


class Encoded(NamedTuple):
    """A prompt as the decoder reads it: each decoder layer's keys and values, and which of them are real."""

    keys_values: list[tuple[Tensor, Tensor]]
    mask_B11P: Tensor


class T5State:
    """What decoding goes on from: the encoded prompt and the decoder's cache."""

    def __init__(self, encoded: Encoded, cache: KVCache) -> None:
        self.encoded = encoded
        self.cache = cache

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row named twice is copied."""
        keys_values = [
            (key[rows_N.to(key.device)], value[rows_N.to(value.device)]) for key, value in self.encoded.keys_values
        ]
        self.encoded = Encoded(keys_values, self.encoded.mask_B11P[rows_N])
        self.cache.select(rows_N)

    def forget(self) -> None:
        """Let go of what rows have left behind that are gone."""
        self.cache.forget()

    def join(self, other: T5State) -> None:
        """Take in the rows of another state, after those here; the shorter prompts get padding, which is masked."""
        own, their = self.encoded.mask_B11P, other.encoded.mask_B11P
        longest = max(own.shape[-1], their.shape[-1])
        keys_values = [
            (_joined(key, their_key, longest), _joined(value, their_value, longest))
            for (key, value), (their_key, their_value) in zip(
                self.encoded.keys_values, other.encoded.keys_values, strict=True
            )
        ]
        mask_B11P = torch.cat([F.pad(mask, (0, longest - mask.shape[-1])) for mask in (own, their)])
        self.encoded = Encoded(keys_values, mask_B11P)
        self.cache.join(other.cache)

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @property
    def num_bytes(self) -> int:
        """See `KVCache.num_bytes`."""
        return self.cache.num_bytes + sum(key.nbytes + value.nbytes for key, value in self.encoded.keys_values)

    @property
    def room(self) -> tuple[int, ...]:
        """See `KVCache.room`."""
        return *self.cache.room, rounded_up(self.encoded.mask_B11P.shape[-1])

    def fixed(self) -> T5State:
        """See `KVCache.fixed`."""
        rows, _, prompt = self.room
        keys_values = [
            (fixed_like(key, rows, prompt), fixed_like(value, rows, prompt)) for key, value in self.encoded.keys_values
        ]
        mask_B11P = self.encoded.mask_B11P.new_zeros(rows, 1, 1, prompt)
        return T5State(Encoded(keys_values, mask_B11P), self.cache.fixed())

    def settle(self, home: T5State) -> None:
        """See `KVCache.settle`."""
        rows, prompt = self.encoded.mask_B11P.shape[0], self.encoded.mask_B11P.shape[-1]
        keys, values = map(list, zip(*self.encoded.keys_values, strict=True))
        their_keys, their_values = map(list, zip(*home.encoded.keys_values, strict=True))
        settle(keys, their_keys, prompt)
        settle(values, their_values, prompt)
        mask_B11P = self.encoded.mask_B11P.clone()
        home.encoded.mask_B11P.zero_()[:rows, ..., :prompt] = mask_B11P
        self.encoded = Encoded([*zip(keys, values, strict=True)], home.encoded.mask_B11P[:rows])
        self.cache.settle(home.cache)

    def lives_in(self, home: T5State) -> bool:
        return self.cache.lives_in(home.cache)

    def count_step(self) -> None:
        """See `KVCache.count_step`."""
        self.cache.count_step()


class T5(nn.Module):
    """See `blip2.language` for what a language model offers; here the prompt goes into the encoder."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        bias = partial(
            RelativePositionBias,
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
            num_heads=config.num_heads,
        )
        self.encoder_bias = bias(is_bidirectional=True)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.encoder_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder_bias = bias(is_bidirectional=False)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_decoder_layers))
        self.decoder_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.output = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in; the tables may be kept in less."""
        return self.decoder_norm.weight.dtype

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """``int[B, T]`` to ``float[B, T, D]``; encoder and decoder share the table."""
        return self.token_embedding(tokens_BT).to(self.dtype)

    @never_in_float16
    def encode(self, prompt_BPD: Tensor, lengths_B: Tensor) -> Encoded:
        """Read right-padded prompts ``float[B, P, D]`` of ``lengths_B`` tokens."""
        positions_P = torch.arange(prompt_BPD.shape[1], device=prompt_BPD.device)
        mask_B11P = (positions_P < lengths_B[:, None])[:, None, None]
        bias = _masked(self.encoder_bias(positions_P, positions_P), mask_B11P)
        x_BPD = prompt_BPD
        for block in self.encoder:
            x_BPD = block(x_BPD, bias)
        x_BPD = self.encoder_norm(x_BPD)
        blocks = cast("Iterable[DecoderBlock]", self.decoder)
        return Encoded([block.cross_attention.keys_values(x_BPD) for block in blocks], mask_B11P)

    @never_in_float16
    def decode(self, embeddings_BTD: Tensor, encoded: Encoded, cache: KVCache | None = None) -> Tensor:
        """Decoder states ``float[B, T, D]`` after the final norm; each token sees those before it and the prompt.

        With a cache the tokens continue the cached rows; without, they are the whole text.
        """
        num_tokens = embeddings_BTD.shape[1]
        if cache is None:
            positions_BT = torch.arange(num_tokens, device=embeddings_BTD.device)[None]
            mask = (positions_BT[0] <= positions_BT[..., None])[:, None]
        else:
            positions_BT = cache.positions(num_tokens)
            mask = cache.mask(positions_BT)
        keys_S = torch.arange(mask.shape[-1], device=embeddings_BTD.device)
        bias = _masked(self.decoder_bias(positions_BT, keys_S), mask)
        x_BTD = embeddings_BTD
        for layer, block in enumerate(self.decoder):
            x_BTD = block(
                x_BTD,
                layer=layer,
                cache=cache,
                positions_BT=positions_BT,
                bias=bias,
                encoded=encoded.keys_values[layer],
                encoded_mask=encoded.mask_B11P,
            )
        return self.decoder_norm(x_BTD)

    def forward(self, prompt_BPD: Tensor, lengths_B: Tensor, decoder_tokens_BT: Tensor) -> Tensor:
        """The whole text at once, for training: decoder states ``float[B, T, D]``."""
        return self.decode(self.embed(decoder_tokens_BT), self.encode(prompt_BPD, lengths_B))

    @never_in_float16
    def logits(self, hidden: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., V]``."""
        return self.output(hidden)

    def prefill(self, prompt_BPD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, T5State]:
        """Read right-padded prompts; the logits of each row's first token ``float[B, V]``, and the state to go on."""
        cache = KVCache(
            self.decoder,
            rows=len(prompt_BPD),
            num_heads=self.config.num_heads,
            capacity=1 + num_new_tokens,
            head_size=self.config.head_size,
            device=prompt_BPD.device,
            dtype=prompt_BPD.dtype,
        )
        state = T5State(self.encode(prompt_BPD, lengths_B), cache)
        start_B = torch.full((len(prompt_BPD),), self.config.decoder_start_token_id, device=prompt_BPD.device)
        return self.step(start_B, state), state

    def step(self, tokens_B: Tensor, state: T5State) -> Tensor:
        """Append one token to every row; the logits of the next one, ``float[B, V]``."""
        hidden_B1D = self.decode(self.embed(tokens_B[:, None]), state.encoded, state.cache)
        state.cache.advance(1, 1)
        return self.logits(hidden_B1D[:, 0])


def _joined(first_BHPD: Tensor, second_BHPD: Tensor, longest: int) -> Tensor:
    """The rows of both, with room for ``longest`` tokens."""
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in (first_BHPD, second_BHPD)])


def _masked(bias: Tensor, mask: Tensor) -> Tensor:
    """The position bias where the mask is True, minus infinity elsewhere: one float mask for the kernel."""
    if bias.dim() == 3:
        bias = bias[None]
    return torch.where(mask, bias, float("-inf"))
