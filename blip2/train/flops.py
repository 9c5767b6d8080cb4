"""How much arithmetic a training step is, by the sizes of the model, and how much a device can do.

Counted are the operations of products of matrices, two for each pair of numbers, as everybody does: norms,
activations and dropout are little beside them. What learns takes thrice its forward pass (the gradients towards its
inputs and its weights), what is frozen twice if a gradient passes through it, else once. What is computed again to save
memory is not counted: it is no work of the model. So the share of a device's peak is the "model FLOP utilisation".

B rows, Q queries, P patches, T text tokens, S tokens so far.
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
"""Operations a second in bfloat16, without sparsity, as their makers tell them; the first name that fits counts."""
SIZE, TIMES = 1024, 5


class Texts(NamedTuple):
    """Of a part of a batch: its rows, how wide their texts are padded, and how many tokens are predicted; ``decoded``:
    how wide what a T5's decoder reads is; ``read``: rows of texts, of which a picture may have several."""

    rows: int
    width: int
    targets: int
    decoded: int = 0
    read: int = 0


def of_vision(config: VisionConfig | ConvolutionalConfig, rows: int) -> int:
    """The forward pass of so many pictures."""
    if isinstance(config, ConvolutionalConfig):
        return rows * _of_convolutions(config)
    width, tokens = config.hidden_size, config.num_prefix_tokens + config.num_patches
    products = 4 * width * width + (2 + config.has_gate) * width * config.intermediate_size
    layer = 2 * tokens * products + 4 * tokens * tokens * width
    return rows * (config.num_layers * layer + 2 * config.num_patches * 3 * config.patch_size**2 * width)


def _of_convolutions(config: ConvolutionalConfig) -> int:
    """The forward pass of a picture, convolution by convolution."""
    side = -(-config.image_size // 2)
    total = side**2 * 3 * 9 * STEM_WIDTH
    for num_inputs, num_outputs, kernel, stride, expansion in sizes_of_blocks(config):
        width = num_inputs * expansion
        total += side**2 * num_inputs * width * (expansion > 1)
        side = -(-side // stride)
        total += side**2 * width * (kernel**2 + num_outputs)
    return 2 * (total + side**2 * config.widths[-1] * config.hidden_size * config.has_head)


def of_qformer(config: QFormerConfig, rows: int, *, queries: int, text: int, past: int = 0, patches: int = 0) -> int:
    """The forward pass of queries and text, with what was seen before, without `of_image_keys`."""
    width, tokens = config.hidden_size, queries + text
    layer = 2 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    layer += 4 * tokens * (tokens + past) * width
    crossing = 4 * queries * width * (width + patches)
    return rows * (config.num_layers * layer + _num_crossing(config) * crossing)


def of_image_keys(config: QFormerConfig, rows: int, patches: int) -> int:
    """Keys and values of so many pictures, which all passes over them may share."""
    return rows * _num_crossing(config) * 4 * patches * config.hidden_size * config.encoder_hidden_size


def _num_crossing(config: QFormerConfig) -> int:
    return len(range(0, config.num_layers, config.cross_attention_frequency))


def of_language(config: LanguageConfig, num_queries: int, texts: Texts) -> tuple[int, int]:
    """The forward pass of queries and texts, and the scores of the tokens that are predicted: products with weights,
    and those of attention, which have a gradient towards both sides."""
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


def of_stage1(config: MatcherConfig, texts: Texts, *, vision_passes: int, itg: bool = True) -> int:
    """Forward and backward of a part of a batch; ``vision_passes``: 0 if features are kept, 1 if the image encoder is
    frozen, 2 with adapters, 3 if it learns. ``itg``: whether captions are learnt."""
    qformer, rows, width = config.qformer, texts.rows, texts.width
    queries, patches = qformer.num_query_tokens, config.vision.num_tokens
    looked = of_qformer(qformer, rows, queries=queries, text=0, patches=patches)
    looked += of_image_keys(qformer, rows, patches)
    read = of_qformer(qformer, rows, queries=0, text=width)
    matched = of_qformer(qformer, 3 * rows, queries=queries, text=width, patches=patches)
    written = of_qformer(qformer, rows, queries=0, text=width, past=queries)
    size = qformer.hidden_size
    heads = 2 * rows * (queries + 1) * size * config.projection_size + 2 * 3 * rows * queries * size * 2
    written += 2 * texts.targets * size * (size + qformer.vocab_size)
    learnt = looked + read + matched + heads + (written if itg else 0)
    return 3 * learnt + vision_passes * of_vision(config.vision, rows)


def of_stage2(
    config: Blip2Config, texts: Texts, *, vision_passes: int, prompts: tuple[int, int] | None = None
) -> int:
    """As `of_stage1`; the language model is frozen, and the gradient passes through it. ``prompts``: how many texts the
    Q-Former reads, each with a look of its own, and how wide they are padded."""
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
    """What ``devices`` like this one can do together: operations a second, and how that is known."""

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
        each = f"{self._found[0] / 1e12:.3g} tera-operations a second, {self._found[1]}"
        return f"mfu is the share of {each}" + (f", times {self.devices}" if self.devices > 1 else "")

    def memory_mb(self) -> float:
        return peak_memory_mb(self.device)


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second that a device can do in a precision, and how that is known."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, value in DENSE_BF16.items():
            if known in name:
                return value, f"as the maker of the {name} tells it for bfloat16"
    x = torch.randn(SIZE, SIZE, device=device, dtype=dtype)
    times = []
    for _ in range(TIMES):
        _wait(device)
        began = time.perf_counter()
        x @ x
        _wait(device)
        times.append(time.perf_counter() - began)
    return 2 * SIZE**3 / min(times), f"the best of {TIMES} products of {SIZE} x {SIZE} numbers in {dtype}"


def peak_memory_mb(device: torch.device) -> float:
    """The most that this process had so far: on a GPU of its memory, else of the machine's; NaN where nobody tells."""
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
