"""A frozen convolutional image encoder: EfficientNet-Lite.

Tan and Le 2019 (https://arxiv.org/abs/1905.11946), in the "lite" variant that Google published in 2020: without
squeeze-and-excitation, with ReLU6 instead of SiLU, and with a stem and a head of fixed width. Batch norms are folded
into the weights when files are read (`checkpoint.convolutions`), so each convolution has a bias here.

The Q-Former reads the places of the last grid, each 1/32 of the image's side, row by row. B images, C channels, H, W
pixels or places, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import ConvolutionalConfig

STEM_WIDTH = 32
STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
"""Kernel size, stride of the first block, and expansion factor of the blocks (Table 1 of the paper)."""
POSITION_SCALE = 0.5
"""The features of Lite0 have a standard deviation of about 0.9 on photographs."""


class Convolution(nn.Conv2d):
    """A convolution with an output for each ``stride`` pixels and TensorFlow's "same" zero padding: if the padding is
    odd, the larger part comes after."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(num_inputs, num_outputs, kernel, stride, groups=groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        [kernel, _], [stride, _] = self.kernel_size, self.stride
        height, width = (max(0, kernel - (length % stride or stride)) for length in x_BCHW.shape[-2:])
        padding = height // 2, width // 2
        if height % 2 or width % 2:  # else without a copy
            x_BCHW = F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2))
            padding = 0, 0
        return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, groups=self.groups)


class Bottleneck(nn.Module):
    """Expansion, depthwise convolution, projection; with a residual connection if the shape does not change."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = num_inputs * expansion
        self.expand = Convolution(num_inputs, width) if expansion > 1 else None
        self.depthwise = Convolution(width, width, kernel, stride, groups=width)
        self.project = Convolution(width, num_outputs)
        self.has_shortcut = stride == 1 and num_inputs == num_outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        wide_BCHW = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW), inplace=True)
        out_BCHW = self.project(F.relu6(self.depthwise(wide_BCHW), inplace=True))
        return x_BCHW + out_BCHW if self.has_shortcut else out_BCHW


class ConvolutionalEncoder(nn.Module):
    """Pixels to patch features, with the interface of `vision.VisionTransformer`: `features` is frozen, `post_norm` is
    trained."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = Convolution(3, STEM_WIDTH, kernel=3, stride=2)
        self.blocks = nn.ModuleList(Bottleneck(*sizes) for sizes in sizes_of_blocks(config))
        self.head = Convolution(config.widths[-1], config.hidden_size) if config.has_head else None
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def resize(self, size: int) -> None:
        """Change the image size to ``size`` pixels; convolutions have no position embeddings to resize."""
        self.config = replace(self.config, image_size=size)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` normalised pixels of any size to ``float[B, P, D]``, before the layer norm."""
        x_BCHW = pixels_BCHW.to(self.patch_embedding.weight.dtype, memory_format=torch.channels_last)
        x_BCHW = F.relu6(self.patch_embedding(x_BCHW), inplace=True)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        if self.head is not None:
            x_BCHW = F.relu6(self.head(x_BCHW), inplace=True)
        patches_BPD = x_BCHW.flatten(2).transpose(1, 2).contiguous()
        mean_B1D = patches_BPD.mean(dim=1, keepdim=True)
        if self.config.has_positions:
            height, width = x_BCHW.shape[-2:]
            patches_BPD = patches_BPD + positions(height, width, patches_BPD.shape[-1]).to(patches_BPD)
        return torch.cat([mean_B1D, patches_BPD], dim=1) if self.config.keeps_class_token else patches_BPD

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` to ``float[B, P, D]``, normalised."""
        return self.post_norm(self.features(pixels_BCHW))


def positions(height: int, width: int, size: int) -> Tensor:
    """The position of each of height x width places, ``float32[P, size]``: sines and cosines of the row in half of the
    channels, of the column in the others, times `POSITION_SCALE`.

    Their frequencies go from a quarter of a turn over the whole side to half a turn from place to place, so that both
    halves of the grid and neighbouring places are easy to distinguish.
    """
    axes = []
    for length in (height, width):
        place_N1 = (torch.arange(length)[:, None] + 0.5) / length
        frequency_F = math.pi / 2 * (2 * max(2, length)) ** torch.linspace(0, 1, size // 4)
        axes.append(torch.cat([(place_N1 * frequency_F).sin(), (place_N1 * frequency_F).cos()], dim=1))
    rows_HD, columns_WD = axes
    shape = height, width, rows_HD.shape[1]
    both_HWD = torch.cat([rows_HD[:, None].expand(shape), columns_WD[None].expand(shape)], dim=-1)
    return POSITION_SCALE * both_HWD.flatten(0, 1)


def sizes_of_blocks(config: ConvolutionalConfig) -> Iterator[tuple[int, int, int, int, int]]:
    """The arguments of `Bottleneck` for each block of each stage."""
    num_inputs = STEM_WIDTH
    for (kernel, stride, expansion), width, depth in zip(STAGES, config.widths, config.depths, strict=True):
        for number in range(depth):
            yield num_inputs, width, kernel, stride if number == 0 else 1, expansion
            num_inputs = width
