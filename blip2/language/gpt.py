"""Layers of the GPT-2 architecture (Radford et al., 2019): GPT-2, GPT-NeoX and Pythia, BLOOM.

Pre-norm LayerNorm, biases everywhere, feed-forward layers without a gate. In GPT-NeoX attention and feed-forward layer
read the same input; GPT-NeoX and BLOOM interleave query, key and value of each head.

B rows, T tokens of this call, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2.config import DecoderConfig
from blip2.language.activations import ACTIVATIONS
from blip2.language.rotary import View
from blip2.layers import KVCache, attend
from blip2.linear import Linear
from blip2.native.program import Planes, Program, X


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.is_parallel = config.is_parallel
        self.is_interleaved = config.is_interleaved
        self.activation_name = config.activation
        self.activation = ACTIVATIONS[config.activation]
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.qkv = Linear(width, 3 * width, config.has_qkv_bias)
        self.output = Linear(width, width, config.has_output_bias)
        self.feed_forward_norm = nn.LayerNorm(width, config.norm_eps)
        self.fc1 = Linear(width, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, width)

    def forward(self, x_BTD: Tensor, *, layer: int, cache: KVCache | None, positions_BT: Tensor, view: View) -> Tensor:
        attended_BTD = x_BTD + self._attended(self.attention_norm(x_BTD), layer, cache, positions_BT, view)
        read_BTD = self.feed_forward_norm(x_BTD if self.is_parallel else attended_BTD)
        return attended_BTD + self.fc2(self.activation(self.fc1(read_BTD)))

    def write_step(self, program: Program, planes: Planes) -> None:
        """`forward` for one token of each row, as a program."""
        heads, width = self.num_heads, self.output.out_features
        size = self.output.in_features // heads
        between, stride = (size, 3 * size) if self.is_interleaved else (heads * size, size)
        normed = program.buffer("normed", width)
        program.norm(self.attention_norm, X, normed)
        parts = program.linear(self.qkv, normed, "heads")
        if self.is_parallel:
            program.norm(self.feed_forward_norm, X, normed)
        for first in (0, between):
            program.turn(parts, planes, first=first, stride=stride, heads=heads)
        program.write(parts, planes, firsts=(between, 2 * between), stride=stride, heads=heads, size=size)
        attended = program.attend(parts, "attended", planes, stride=stride, heads=heads, size=size)
        program.add(program.linear(self.output, attended, "output"), X)
        if not self.is_parallel:
            program.norm(self.feed_forward_norm, X, normed)
        inner = program.linear(self.fc1, normed, "inner")
        hidden = program.activate(self.activation_name, inner, "hidden", is_gated=False)
        program.add(program.linear(self.fc2, hidden, "output"), X)

    def _attended(self, x_BTD: Tensor, layer: int, cache: KVCache | None, positions_BT: Tensor, view: View) -> Tensor:
        shape = (self.num_heads, 3, -1) if self.is_interleaved else (3, self.num_heads, -1)
        parts = self.qkv(x_BTD).unflatten(-1, shape).movedim(-2 if self.is_interleaved else -3, 0)
        query, key, value = parts.transpose(2, 3)  # each [B, H, T, head size]
        if view.turn is not None:
            query, key = view.turn(torch.cat([query, key], dim=1)).chunk(2, dim=1)
        if cache is not None:
            key, value = cache.write(layer, key, value, positions_BT)
        return self.output(attend(query, key, value, mask=view.mask, is_causal=view.mask is None))
