"""Layers of the Llama architecture (Touvron et al., 2023): Llama, Mistral, Qwen, SmolLM, Gemma, Phi, Granite.

Pre-norm RMSNorm, grouped-query attention (Ainslie et al., 2023), gated feed-forward layers. `DecoderConfig` describes
the differences between families.

B rows, T tokens of this call, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from blip2.config import DecoderConfig
from blip2.language.activations import ACTIVATIONS
from blip2.language.norm import RMSNorm
from blip2.language.rotary import View
from blip2.layers import KVCache, attend
from blip2.linear import Linear
from blip2.native.program import Planes, Program, X


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_size
        self.num_heads = config.num_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.attention_scale = config.attention_scale
        self.attention_cap = config.attention_cap
        self.residual_scale = config.residual_scale
        self.activation_name = config.activation
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

    def write_step(self, program: Program, planes: Planes) -> None:
        """`forward` for one token of each row, as a program."""
        heads, shared = self.num_heads, self.num_key_value_heads
        size = self.qkv.out_features // (heads + 2 * shared)
        normed = program.buffer("normed", self.qkv.in_features)
        program.norm(self.attention_norm, X, normed)
        parts = program.linear(self.qkv, normed, "heads")
        if self.query_norm is not None and self.key_norm is not None:
            program.norm(self.query_norm, parts, parts, count=heads)
            program.norm(self.key_norm, parts, parts, first=heads * size, count=shared)
        program.turn(parts, planes, first=0, stride=size, heads=heads + shared)
        firsts = heads * size, (heads + shared) * size
        program.write(parts, planes, firsts=firsts, stride=size, heads=shared, size=size)
        attended = program.attend(
            parts, "attended", planes, stride=size, heads=heads, size=size, sharing=heads // shared,
            scale=self.attention_scale, cap=self.attention_cap,
        )  # fmt: skip
        output = program.linear(self.output, attended, "output")
        if self.attention_post_norm is not None:
            program.norm(self.attention_post_norm, output, output)
        program.add(output, X, self.residual_scale)
        program.norm(self.feed_forward_norm, X, normed)
        hidden = program.activate(
            self.activation_name, program.linear(self.gate_up, normed, "gate and up"), "hidden", is_gated=True
        )
        program.linear(self.down, hidden, "output")
        if self.feed_forward_post_norm is not None:
            program.norm(self.feed_forward_post_norm, output, output)
        program.add(output, X, self.residual_scale)

    def _added(self, x_BTD: Tensor, said_BTD: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is not None:
            said_BTD = norm(said_BTD)
        return x_BTD + (said_BTD if self.residual_scale == 1 else said_BTD * self.residual_scale)
