"""Arithmetic of a training step, computed from the sizes of the model, and the peak throughput of a device.

Only matrix products are counted, as is usual, with two operations for each multiply-add; norms, activations and dropout
are small beside them. A trained layer counts three times its forward pass (gradients of its inputs and of its weights),
a frozen layer twice if a gradient passes through it, else once. Recomputed activations are not counted, since they are
not work of the model. The share of the device's peak is the model FLOP utilisation (MFU).

B rows, Q query tokens, P patches, T text tokens, S tokens so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from blip2.config import (
    Blip2Config,
    ConvolutionalConfig,
    DecoderConfig,
    LanguageConfig,
    MatcherConfig,
    QFormerConfig,
    T5Config,
    VisionConfig,
)  # fmt: skip
from blip2.convolutional import STEM_WIDTH, sizes_of_blocks

DENSE_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A10G": 70e12, "A10": 125e12, "A40": 150e12, "A6000": 155e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "MI300X": 1307e12, "MI250X": 383e12,
}  # fmt: skip
"""Dense operations per second in bfloat16, as the manufacturers state them. The first name that matches counts."""
SIZE, TIMES = 1024, 5


class Texts(NamedTuple):
    """Sizes of a part of a batch: its rows, the padded width of their texts, and the number of predicted tokens.
    ``decoded``: the padded width of a T5's decoder input. ``read``: the number of text rows, since an image may have
    several."""

    rows: int
    width: int
    targets: int
    decoded: int = 0
    read: int = 0


def of_vision(config: VisionConfig | ConvolutionalConfig, rows: int) -> int:
    """Forward pass of the image encoder over ``rows`` images."""
    if isinstance(config, ConvolutionalConfig):
        return rows * _of_convolutions(config)
    width, tokens = config.hidden_size, config.num_prefix_tokens + config.num_patches
    products = 4 * width * width + (2 + config.has_gate) * width * config.intermediate_size
    layer = 2 * tokens * products + 4 * tokens * tokens * width
    return rows * (config.num_layers * layer + 2 * config.num_patches * 3 * config.patch_size**2 * width)


def _of_convolutions(config: ConvolutionalConfig) -> int:
    """Forward pass of one image, summed over the convolutions."""
    side = -(-config.image_size // 2)
    total = side**2 * 3 * 9 * STEM_WIDTH
    for num_inputs, num_outputs, kernel, stride, expansion in sizes_of_blocks(config):
        width = num_inputs * expansion
        total += side**2 * num_inputs * width * (expansion > 1)
        side = -(-side // stride)
        total += side**2 * width * (kernel**2 + num_outputs)
    return 2 * (total + side**2 * config.widths[-1] * config.hidden_size * config.has_head)


def of_qformer(config: QFormerConfig, rows: int, *, queries: int, text: int, past: int = 0, patches: int = 0) -> int:
    """Forward pass of query tokens and text with ``past`` cached tokens, without `of_image_keys`."""
    width, tokens = config.hidden_size, queries + text
    layer = 2 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    layer += 4 * tokens * (tokens + past) * width
    crossing = 4 * queries * width * (width + patches)
    return rows * (config.num_layers * layer + _num_crossing(config) * crossing)


def of_image_keys(config: QFormerConfig, rows: int, patches: int) -> int:
    """Keys and values of ``rows`` images, which all passes over the same images can share."""
    return rows * _num_crossing(config) * 4 * patches * config.hidden_size * config.encoder_hidden_size


def _num_crossing(config: QFormerConfig) -> int:
    return len(range(0, config.num_layers, config.cross_attention_frequency))


def of_language(config: LanguageConfig, num_queries: int, texts: Texts) -> tuple[int, int]:
    """Forward pass of query tokens and texts, and the logits of the predicted tokens. Returns products with weights,
    and products of attention, whose two inputs both have a gradient."""
    width, wide, inner = config.hidden_size, config.intermediate_size, config.num_heads * config.head_size
    scores = 2 * texts.targets * width * config.vocab_size
    read = num_queries + texts.width
    if isinstance(config, T5Config):
        feeding = (2 + config.has_gate) * width * wide
        encoder = 2 * read * (4 * width * inner + feeding)
        decoder = 2 * texts.decoded * (6 * width * inner + feeding) + 2 * read * 2 * width * inner
        looks = config.num_layers * read * read + config.num_decoder_layers * texts.decoded * (texts.decoded + read)
        layers = config.num_layers * encoder + config.num_decoder_layers * decoder
        return texts.read * layers + scores, 4 * texts.read * looks * inner
    shared = config.num_key_value_heads * config.head_size
    gated = isinstance(config, DecoderConfig) and config.make == "llama"
    products = 2 * width * (inner + shared) + (2 + gated) * width * wide
    tokens = texts.rows * config.num_layers * read
    return 2 * tokens * products + scores, 4 * tokens * read * inner


def of_stage1(config: MatcherConfig, texts: Texts, *, vision_passes: int, itm: bool = True, itg: bool = True) -> int:
    """Forward and backward pass of a part of a batch. ``vision_passes``: 0 with kept features, 1 with a frozen image
    encoder, 2 with adapters in it, 3 if it is trained. ``itm`` and ``itg``: whether they are trained."""
    qformer, rows, width = config.qformer, texts.rows, texts.width
    queries, patches = qformer.num_query_tokens, config.vision.num_tokens
    looked = of_qformer(qformer, rows, queries=queries, text=0, patches=patches)
    looked += of_image_keys(qformer, rows, patches)
    read = of_qformer(qformer, rows, queries=0, text=width)
    matched = of_qformer(qformer, 3 * rows, queries=queries, text=width, patches=patches)
    written = of_qformer(qformer, rows, queries=0, text=width, past=queries)
    size = qformer.hidden_size
    heads = 2 * rows * (queries + 1) * size * config.projection_size
    matched += 2 * 3 * rows * queries * size * 2
    written += 2 * texts.targets * size * (size + qformer.vocab_size)
    learnt = looked + read + heads + (matched if itm else 0) + (written if itg else 0)
    return 3 * learnt + vision_passes * of_vision(config.vision, rows)


def of_stage2(
    config: Blip2Config, texts: Texts, *, vision_passes: int, prompts: tuple[int, int] | None = None
) -> int:
    """As `of_stage1`. The language model is frozen, but the gradient passes through it. ``prompts``: the number of
    texts that the Q-Former reads, each with a pass of its own, and their padded width."""
    qformer, rows = config.qformer, texts.rows
    queries = qformer.num_query_tokens
    patches = config.vision.num_tokens
    looks, text = prompts or (rows, 0)
    looked = of_qformer(qformer, looks, queries=queries, text=text, patches=patches)
    looked += of_image_keys(qformer, looks, patches)
    projected = 2 * looks * queries * qformer.hidden_size * config.language.hidden_size
    spoken, attended = of_language(config.language, queries, texts)
    return 3 * (looked + projected + attended) + 2 * spoken + vision_passes * of_vision(config.vision, rows)


@dataclass(frozen=True)
class Peak:
    """Peak throughput of ``devices`` devices like this one, in operations per second, and how it was determined."""

    device: torch.device
    devices: int
    dtype: torch.dtype = torch.float32

    @cached_property
    def _found(self) -> tuple[float, str]:
        return peak(self.device, self.dtype)

    @property
    def flops(self) -> float:
        return self._found[0] * self.devices

    def __str__(self) -> str:
        each = f"{self._found[0] / 1e12:.3g} TFLOP/s, {self._found[1]}"
        return f"mfu is relative to {each}" + (f", times {self.devices}" if self.devices > 1 else "")

    def memory_mb(self) -> float:
        return peak_memory_mb(self.device)


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak throughput of a device in a dtype, in operations per second, and how it was determined."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, value in DENSE_BF16.items():
            if known in name:
                return value, f"the manufacturer's figure of the {name} for bfloat16"
    x = torch.randn(SIZE, SIZE, device=device, dtype=dtype)
    times = []
    for _ in range(TIMES):
        _wait(device)
        began = time.perf_counter()
        x @ x
        _wait(device)
        times.append(time.perf_counter() - began)
    return 2 * SIZE**3 / min(times), f"the best of {TIMES} products of {SIZE} x {SIZE} matrices in {dtype}"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far in MB: GPU memory on a GPU, else main memory; NaN where it cannot be
    measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
