"""The frozen image encoder: a vision transformer.

EVA-CLIP g/14 and CLIP L/14 as in BLIP-2 (without the last block, so the output is the second-last layer's features;
section 3.1 of the paper), and small ones of the same architecture. By configuration also SigLIP, DINOv2, DINOv3 and
plain ViT; `checkpoint.encoders` reads their files. Layer scales are folded into the weights, and missing biases are
filled with zeros when files are read.

B images, C colours, H, W pixels, P patches and the tokens before them (class, registers), D width, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import VisionConfig
from blip2.layers import attend, split_parts
from blip2.linear import Linear
from blip2.quantized import QuantizedLinear


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's fast GELU approximation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines ``float[P, E]`` of the rotary position embedding of each token."""


class Block(nn.Module):
    """Pre-norm transformer block: attention with a fused q, k, v product, then the feed-forward layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, intermediate_size, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.activation = ACTIVATIONS[config.activation]
        self.has_gate = config.has_gate
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = Linear(width, 3 * width)
        self.projection = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = Linear(width, (1 + config.has_gate) * intermediate_size)
        self.fc2 = Linear(intermediate_size, width)

    def forward(self, x_BPD: Tensor, rotation: Rotation | None = None) -> Tensor:
        query, key, value = split_parts(self.qkv(self.norm1(x_BPD)), 3, self.num_heads)
        if rotation is not None:
            query, key = rotated(query, rotation), rotated(key, rotation)
        x_BPD = x_BPD + self.projection(attend(query, key, value))
        return x_BPD + self.fc2(self._widen(self.norm2(x_BPD)))

    def _widen(self, x_BPD: Tensor) -> Tensor:
        """The first half of the feed-forward layer, fused in a quantised layer."""
        if self.has_gate:
            gate, wide = self.fc1(x_BPD).chunk(2, dim=-1)
            return self.activation(gate) * wide
        if isinstance(self.fc1, QuantizedLinear) and self.activation is F.gelu:
            return self.fc1(x_BPD, has_gelu=True)
        return self.activation(self.fc1(x_BPD))


class VisionTransformer(nn.Module):
    """Pixels to patch features.

    `features` is the frozen encoder; `post_norm` is the layer norm that BLIP-2 adds and trains together with the
    Q-Former (``ln_vision`` in the authors' code). Calling the module does both.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, eps, num_prefix = config.hidden_size, config.layer_norm_eps, config.num_prefix_tokens
        self.class_embedding = nn.Parameter(torch.empty(1, num_prefix, width))
        self.position_embedding = nn.Parameter(torch.empty(1, num_prefix + config.num_patches, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.has_patch_bias)
        self.pre_norm = nn.LayerNorm(width, eps=eps) if config.has_pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, eps=eps) if config.has_final_norm else nn.Identity()
        self.post_norm = nn.LayerNorm(width, eps=eps)
        nn.init.normal_(self.class_embedding, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` normalised pixels to the input of the first block, ``float[B, P, D]``.

        For another image size the position embedding is interpolated (bicubic); pixels beyond whole patches are
        ignored.
        """
        patches_BDhw = self.patch_embedding(pixels_BCHW.to(self.patch_embedding.weight.dtype))
        x_BPD = torch.cat(
            [self.class_embedding.expand(len(pixels_BCHW), -1, -1), patches_BDhw.flatten(2).transpose(1, 2)], dim=1
        )
        height, width = patches_BDhw.shape[-2:]
        return self.pre_norm(x_BPD + positions_of(self.config, self.position_embedding, height, width))

    def rotation(self, pixels_BCHW: Tensor) -> Rotation | None:
        """The rotary embedding for the patch grid of the pixels, as in `embed`; None without rotary positions."""
        if not self.config.rotary_base:
            return None
        height, width = (length // self.config.patch_size for length in pixels_BCHW.shape[-2:])
        return rotation_of(self.config, height, width, self.position_embedding)

    def finish(self, x_BPD: Tensor) -> Tensor:
        """The last block's output to that of the encoder: ``float[B, P, D]``, without registers."""
        kept, num_prefix = self.config.num_kept_prefix_tokens, self.config.num_prefix_tokens
        if kept < num_prefix:
            x_BPD = torch.cat([x_BPD[:, :kept], x_BPD[:, num_prefix:]], dim=1)
        return self.final_norm(x_BPD)

    @torch.no_grad()
    def resize(self, size: int) -> None:
        """Change the image size to ``size`` pixels, a multiple of the patch size: the positions are interpolated once
        (bicubic, ``align_corners`` False, that of the class token kept), as in ``interpolate_pos_embed`` of
        ``eva_vit.py``."""
        side = size // self.config.patch_size
        positions_1PD = positions_of(self.config, self.position_embedding, side, side).clone()
        self.position_embedding = nn.Parameter(positions_1PD, self.position_embedding.requires_grad)
        self.config = replace(self.config, image_size=size)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels as for `embed` to ``float[B, P, D]``, before the last layer norm."""
        x_BPD, rotation = self.embed(pixels_BCHW), self.rotation(pixels_BCHW)
        for block in self.blocks:
            x_BPD = block(x_BPD, rotation)
        return self.finish(x_BPD)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` to ``float[B, P, D]``, normalised, the class token first if it is kept."""
        return self.post_norm(self.features(pixels_BCHW))


def positions_of(config: VisionConfig, positions_1PD: Tensor, height: int, width: int) -> Tensor:
    """The position embedding for a grid of ``height`` x ``width`` patches, from that of the configuration's grid."""
    side = config.image_size // config.patch_size
    if (height, width) == (side, side):
        return positions_1PD
    prefix_1TD, grid_1PD = positions_1PD.split([config.num_prefix_tokens, side * side], dim=1)
    grid_1Dhw = grid_1PD.transpose(1, 2).unflatten(-1, (side, side))
    # Bicubic in fp32 whatever the model's dtype, as in the reference.
    grid_1Dhw = F.interpolate(
        grid_1Dhw.float(), (height, width), mode="bicubic", align_corners=False, antialias=config.has_smooth_resizing
    )
    return torch.cat([prefix_1TD, grid_1Dhw.flatten(2).transpose(1, 2).to(prefix_1TD.dtype)], dim=1)


def rotation_of(config: VisionConfig, height: int, width: int, like: Tensor) -> Rotation:
    """For a grid of patches with centres from -1 to 1 in both directions; prefix tokens are not rotated."""
    head_size = config.hidden_size // config.num_heads
    frequencies = config.rotary_base ** -(torch.arange(head_size // 4, device=like.device) * 4 / head_size)
    y_h, x_w = (2 * torch.arange(0.5, length, device=like.device) / length - 1 for length in (height, width))
    places_P2 = torch.stack(torch.meshgrid(y_h, x_w, indexing="ij"), dim=-1).flatten(0, 1)
    angles_PE = (2 * math.pi * places_P2[:, :, None] * frequencies).flatten(1).tile(2)
    angles_PE = F.pad(angles_PE, (0, 0, config.num_prefix_tokens, 0))
    return angles_PE.cos().to(like.dtype), angles_PE.sin().to(like.dtype)


def rotated(x_BHPE: Tensor, rotation: Rotation) -> Tensor:
    """Rotated queries or keys: the two halves of a head's dimensions are the coordinates of each plane."""
    cosines_PE, sines_PE = rotation
    first, second = x_BHPE.chunk(2, dim=-1)
    return x_BHPE * cosines_PE + torch.cat([-second, first], dim=-1) * sines_PE
