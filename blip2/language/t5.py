"""T5 (Raffel et al., 2020): an encoder-decoder. Flan-T5 and mT5 are version 1.1, with gated feed-forward layers and a
separate output layer; the first T5 has neither; UMT5 (Chung et al., 2023) has position biases in each layer.

RMSNorm without bias, relative positions as a learned bias of the attention scores (no other positions, no scaling of
the scores).

B rows, P prompt tokens, T new tokens of the decoder, S its tokens so far, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import T5Config
from blip2.language.activations import ACTIVATIONS
from blip2.language.float16 import never_in_float16
from blip2.language.norm import RMSNorm
from blip2.language.stepping import as_plane, program_for, run
from blip2.language.t5_state import Encoded, T5State
from blip2.layers import KVCache, attend, split_heads, split_parts
from blip2.linear import Linear
from blip2.native.program import Planes, Program, X


class RelativePositionBias(nn.Module):
    """A bias for each head and each bucket of distances: exact for near ones, logarithmic for far ones."""

    def __init__(self, config: T5Config, *, is_bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets = config.num_buckets
        self.max_distance = config.max_distance
        self.is_bidirectional = is_bidirectional
        self.table = nn.Embedding(config.num_buckets, config.num_heads)

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

    def __init__(self, config: T5Config, *, is_bidirectional: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.dropout = 0.0  # for training the language model; here it is frozen
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.bias: RelativePositionBias | None = None
        if config.has_bias_in_each_layer:
            self.bias = RelativePositionBias(config, is_bidirectional=is_bidirectional)
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
    """The decoder's attention to the prompt; otherwise as `SelfAttention`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.dropout = 0.0  # for training the language model; here it is frozen
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.query = Linear(config.hidden_size, inner, bias=False)
        self.key_value = Linear(config.hidden_size, 2 * inner, bias=False)
        self.output = Linear(inner, config.hidden_size, bias=False)

    def keys_values(self, encoded_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, ``float[B, H, P, head size]`` each; the same for every decoded token."""
        key, value = split_parts(self.key_value(encoded_BPD), 2, self.num_heads)
        return key, value

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        query = split_heads(self.query(self.norm(x_BTD)), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        attended = self.output(attend(query, *keys_values, mask=mask, scale=1.0, dropout=dropout))
        return F.dropout(attended, dropout, self.training)


class FeedForward(nn.Module):
    """With one fused product for the gate and the gated values; the first T5 has no gate."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.activation_name = config.activation
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = 0.0
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        if config.has_gate:
            self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        else:
            self.up = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.has_gate = config.has_gate
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_gate:
            gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(self.up(self.norm(x)))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class EncoderBlock(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, is_bidirectional=True)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BPD: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.self_attention.heads(x_BPD)
        return self.feed_forward(x_BPD + self.self_attention.attend(query, key, value, bias))


class DecoderBlock(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, is_bidirectional=False)
        self.cross_attention = CrossAttention(config)
        self.feed_forward = FeedForward(config)

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

    def write_step(self, program: Program, own: Planes, encoded: Planes) -> None:
        """`forward` for one token of each row, as a program; the prompt's mask is bool, that of the text is added."""
        looking, crossing, feeding = self.self_attention, self.cross_attention, self.feed_forward
        heads, width = looking.num_heads, looking.output.in_features
        size = width // heads
        normed = program.buffer("normed", looking.qkv.in_features)
        program.norm(looking.norm, X, normed)
        parts = program.linear(looking.qkv, normed, "heads")
        program.write(parts, own, firsts=(width, 2 * width), stride=size, heads=heads, size=size)
        attended = program.attend(parts, "attended", own, stride=size, heads=heads, size=size, scale=1.0)
        program.add(program.linear(looking.output, attended, "output"), X)
        program.norm(crossing.norm, X, normed)
        query = program.linear(crossing.query, normed, "query")
        program.attend(query, "attended", encoded, stride=size, heads=heads, size=size, scale=1.0)
        program.add(program.linear(crossing.output, attended, "output"), X)
        program.norm(feeding.norm, X, normed)
        inner = program.linear(feeding.gate_up if feeding.has_gate else feeding.up, normed, "inner")
        hidden = program.activate(feeding.activation_name, inner, "hidden", is_gated=feeding.has_gate)
        program.add(program.linear(feeding.down, hidden, "output"), X)


class T5(nn.Module):
    """For the protocol see `blip2.language`; the prompt is the input of the encoder."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder_bias, self.decoder_bias = (
            None if config.has_bias_in_each_layer else RelativePositionBias(config, is_bidirectional=is_bidirectional)
            for is_bidirectional in (True, False)
        )
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))
        self.encoder_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_decoder_layers))
        self.decoder_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.output = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation; the embeddings may have a lower precision."""
        return self.decoder_norm.weight.dtype

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """``int[B, T]`` to ``float[B, T, D]``; encoder and decoder share the table."""
        return self.token_embedding(tokens_BT).to(self.dtype)

    @never_in_float16
    def encode(self, prompt_BPD: Tensor, lengths_B: Tensor) -> Encoded:
        """Read right-padded prompts ``float[B, P, D]`` of ``lengths_B`` tokens."""
        positions_P = torch.arange(prompt_BPD.shape[1], device=prompt_BPD.device)
        mask_B11P = (positions_P < lengths_B[:, None])[:, None, None]
        biases = _biases(self.encoder_bias, self.encoder, positions_P, positions_P, mask_B11P)
        x_BPD = prompt_BPD
        for block, bias in zip(self.encoder, biases, strict=True):
            x_BPD = block(x_BPD, bias)
        x_BPD = self.encoder_norm(x_BPD)
        blocks = cast("Iterable[DecoderBlock]", self.decoder)
        return Encoded([block.cross_attention.keys_values(x_BPD) for block in blocks], mask_B11P)

    @never_in_float16
    def decode(self, embeddings_BTD: Tensor, encoded: Encoded, cache: KVCache | None = None) -> Tensor:
        """Decoder states ``float[B, T, D]`` after the final norm; each token attends to those before it and to the
        prompt.

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
        biases = _biases(self.decoder_bias, self.decoder, positions_BT, keys_S, mask)
        x_BTD = embeddings_BTD
        if (program := program_for(x_BTD, cache, self.decoder, self._write_step)) is not None:
            assert cache is not None
            looks = [as_plane(bias.to(x_BTD.dtype)) for bias in ([next(biases)] if self.decoder_bias else biases)]
            prompt = [part for both in encoded.keys_values for part in both]
            planes = [as_plane(encoded.mask_B11P), *cache.planes(), *prompt, *looks]
            return self.decoder_norm(run(program, x_BTD, positions_BT, planes))
        for layer, (block, bias) in enumerate(zip(self.decoder, biases, strict=True)):
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

    def _write_step(self, program: Program) -> None:
        """Planes: the prompt's mask, each layer's keys and values, those of the prompt, one bias or one for each
        layer."""
        first, number = 1, 2 * len(self.decoder)
        for layer, block in enumerate(self.decoder):
            places = [first + 2 * layer, first + number + 2 * layer]
            bias = first + 2 * number + (0 if self.decoder_bias else layer)
            own, encoded = (
                Planes(place, place + 1, mask, has_bool_mask=is_bool)
                for place, mask, is_bool in zip(places, (bias, 0), (False, True), strict=True)
            )
            block.write_step(program, own, encoded)  # type: ignore[operator]

    def forward(self, prompt_BPD: Tensor, lengths_B: Tensor, decoder_tokens_BT: Tensor) -> Tensor:
        """The whole text at once, for training: decoder states ``float[B, T, D]``."""
        return self.decode(self.embed(decoder_tokens_BT), self.encode(prompt_BPD, lengths_B))

    @never_in_float16
    def logits(self, hidden: Tensor) -> Tensor:
        """``float[..., D]`` to ``float[..., V]``."""
        return self.output(hidden * self.config.hidden_size**-0.5 if self.config.scales_output else hidden)

    def prefill(self, prompt_BPD: Tensor, lengths_B: Tensor, num_new_tokens: int) -> tuple[Tensor, T5State]:
        """Read right-padded prompts; returns the logits of each row's first token ``float[B, V]``, and the state."""
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
        """Append one token to every row; returns the logits of the next one, ``float[B, V]``."""
        hidden_B1D = self.decode(self.embed(tokens_B[:, None]), state.encoded, state.cache)
        state.cache.advance(1, 1)
        return self.logits(hidden_B1D[:, 0])


def _biases(
    shared: RelativePositionBias | None, blocks: nn.ModuleList, queries: Tensor, keys_S: Tensor, mask: Tensor
) -> Iterator[Tensor]:
    """Biases of each layer for the positions of queries and keys: shared or separate."""
    if shared is not None:
        yield from [_masked(shared(queries, keys_S), mask)] * len(blocks)
        return
    for block in blocks:
        own = cast("EncoderBlock | DecoderBlock", block).self_attention.bias
        assert own is not None
        yield _masked(own(queries, keys_S), mask)


def _masked(bias: Tensor, mask: Tensor) -> Tensor:
    """The position bias where the mask is True, minus infinity elsewhere: one float mask for the kernel."""
    if bias.dim() == 3:
        bias = bias[None]
    return torch.where(mask, bias, float("-inf"))
