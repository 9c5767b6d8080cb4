"""The frozen image encoder: a vision transformer.

EVA-CLIP g/14 and CLIP L/14 as BLIP-2 uses them (the last block left out, so that what comes out are the
second-last layer's features; section 3.1 of the paper), and small ones of the same make.

B images, C colours, H, W pixels, P patches and the class token before them, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import VisionConfig
from blip2.layers import attend, split_parts
from blip2.linear import Linear
from blip2.quantized import QuantizedLinear


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's cheap GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Block(nn.Module):
    """Pre-norm transformer block: attention with one fused q, k, v product, then the feed-forward layer."""

    def __init__(self, *, width: int, num_heads: int, intermediate_size: int, eps: float, activation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.activation = ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = Linear(width, 3 * width)
        self.projection = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = Linear(width, intermediate_size)
        self.fc2 = Linear(intermediate_size, width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        query, key, value = split_parts(self.qkv(self.norm1(x_BPD)), 3, self.num_heads)
        x_BPD = x_BPD + self.projection(attend(query, key, value))
        return x_BPD + self.fc2(self._widen(self.norm2(x_BPD)))

    def _widen(self, x_BPD: Tensor) -> Tensor:
        """The feed-forward layer's first half, which a quantised layer does in one go."""
        if isinstance(self.fc1, QuantizedLinear) and self.activation is F.gelu:
            return self.fc1(x_BPD, has_gelu=True)
        return self.activation(self.fc1(x_BPD))


class VisionTransformer(nn.Module):
    """Pixels to patch features.

    `features` is the frozen encoder; `post_norm` is the layer norm that BLIP-2 puts on it and trains together
    with the Q-Former (``ln_vision`` in the authors' code). Calling the module does both.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_patches + 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=config.has_patch_bias)
        self.pre_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.has_pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                num_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                eps=config.layer_norm_eps,
                activation=config.activation,
            )
            for _ in range(config.num_layers)
        )
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        nn.init.normal_(self.class_embedding, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` normalised pixels to what the first block reads, ``float[B, 1 + P, D]``.

        A picture of another size than the model's (both sides multiples of the patch size) is met by bicubic
        interpolation of the position embedding.
        """
        patches_BDhw = self.patch_embedding(pixels_BCHW.to(self.patch_embedding.weight.dtype))
        height, width = patches_BDhw.shape[-2:]
        x_BPD = torch.cat(
            [self.class_embedding.expand(len(pixels_BCHW), -1, -1), patches_BDhw.flatten(2).transpose(1, 2)], dim=1
        )
        return self.pre_norm(x_BPD + self._positions(height, width))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels as for `embed` to ``float[B, 1 + P, D]``, before the last layer norm."""
        x_BPD = self.embed(pixels_BCHW)
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return x_BPD

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` to ``float[B, 1 + P, D]``, normalised, class token first."""
        return self.post_norm(self.features(pixels_BCHW))

    def _positions(self, height: int, width: int) -> Tensor:
        """The position embedding for a grid of ``height`` x ``width`` patches: ``float[1, 1 + P, D]``."""
        side = self.config.image_size // self.config.patch_size
        if (height, width) == (side, side):
            return self.position_embedding
        class_11D, grid_1PD = self.position_embedding.split([1, side * side], dim=1)
        grid_1Dhw = grid_1PD.transpose(1, 2).unflatten(-1, (side, side))
        # Bicubic in fp32 whatever the model's precision, as the reference does it.
        grid_1Dhw = F.interpolate(grid_1Dhw.float(), (height, width), mode="bicubic", align_corners=False)
        return torch.cat([class_11D, grid_1Dhw.flatten(2).transpose(1, 2).to(class_11D.dtype)], dim=1)
