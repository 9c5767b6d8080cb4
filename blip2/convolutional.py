"""The frozen image encoder, where it is a network of convolutions: EfficientNet-Lite.

Tan and Le 2019 (https://arxiv.org/abs/1905.11946), in the "lite" form that Google published in 2020: without the
squeeze-and-excitation of the paper, with ReLU6 for SiLU, and a stem and a head that do not grow. Batch norms are
multiplied into the weights when files are read (`checkpoint.convolutions`), so each convolution has a bias here.

What the Q-Former sees are the places of the last grid, a 32nd of the picture's side each, row by row.
B images, C channels, H, W pixels or places, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import ConvolutionalConfig

STEM_WIDTH = 32
STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
"""Kernel, stride of the first block, and how much wider the middle of a block is (Table 1 of the paper)."""


class Convolution(nn.Conv2d):
    """One that gives a place for each ``stride`` pixels, with zeros around the picture as TensorFlow puts them: where
    their number is odd, one more after than before."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(num_inputs, num_outputs, kernel, stride, groups=groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        [kernel, _], [stride, _] = self.kernel_size, self.stride
        height, width = (max(0, kernel - (length % stride or stride)) for length in x_BCHW.shape[-2:])
        if height or width:
            x_BCHW = F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x_BCHW)


class Bottleneck(nn.Module):
    """Wider, each channel by itself, narrower again; with a way around where nothing changes its shape."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = num_inputs * expansion
        self.expand = Convolution(num_inputs, width) if expansion > 1 else None
        self.depthwise = Convolution(width, width, kernel, stride, groups=width)
        self.project = Convolution(width, num_outputs)
        self.has_shortcut = stride == 1 and num_inputs == num_outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        wide_BCHW = x_BCHW if self.expand is None else F.relu6(self.expand(x_BCHW))
        out_BCHW = self.project(F.relu6(self.depthwise(wide_BCHW)))
        return x_BCHW + out_BCHW if self.has_shortcut else out_BCHW


class ConvolutionalEncoder(nn.Module):
    """Pixels to patch features, as `vision.VisionTransformer` does it: `features` is frozen, `post_norm` is trained."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = Convolution(3, STEM_WIDTH, kernel=3, stride=2)
        self.blocks = nn.ModuleList(Bottleneck(*sizes) for sizes in sizes_of_blocks(config))
        self.head = Convolution(config.widths[-1], config.hidden_size) if config.has_head else None
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def resize(self, size: int) -> None:
        """Make it one of pictures of ``size`` pixels: convolutions have no positions."""
        self.config = replace(self.config, image_size=size)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` normalised pixels of any size to ``float[B, P, D]``, before the layer norm."""
        x_BCHW = F.relu6(self.patch_embedding(pixels_BCHW.to(self.patch_embedding.weight.dtype)))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        if self.head is not None:
            x_BCHW = F.relu6(self.head(x_BCHW))
        return x_BCHW.flatten(2).transpose(1, 2).contiguous()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """``float[B, 3, H, W]`` to ``float[B, P, D]``, normalised."""
        return self.post_norm(self.features(pixels_BCHW))


def sizes_of_blocks(config: ConvolutionalConfig) -> Iterator[tuple[int, int, int, int, int]]:
    """What a `Bottleneck` is made of, for each block of each stage."""
    num_inputs = STEM_WIDTH
    for (kernel, stride, expansion), width, depth in zip(STAGES, config.widths, config.depths, strict=True):
        for number in range(depth):
            yield num_inputs, width, kernel, stride if number == 0 else 1, expansion
            num_inputs = width
