"""The dtype of each part of a model: the rules, and their reasons."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blip2.checkpoint.quantize import Quantization
from blip2.config import Blip2Config, LanguageConfig, MatcherConfig
from blip2.errors import OptionError, option, setting

LARGE = 500_000_000
"""From this many parameters on, bfloat16 is faster on a CPU that supports it; below, conversions cost what it saves."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = ("language.token_embedding", "language.position_embedding")


@dataclass(frozen=True)
class Precision:
    """``vision`` and ``language``: the dtypes of computation; ``tables``: dtype of the language model's embeddings.

    Everything else (the Q-Former, its query tokens and heads, the projection) is float32: it is small, and its norms
    add 1e-12. ``reason``: explanation as text.
    """

    vision: torch.dtype
    language: torch.dtype
    tables: torch.dtype
    reason: str

    def of(self, name: str) -> torch.dtype:
        """The dtype of a parameter, by our name."""
        if name.startswith(TABLES):
            return self.tables
        part = name.split(".")[0]
        return {"vision": self.vision, "language": self.language}.get(part, torch.float32)


def choose_precision(
    config: Blip2Config | MatcherConfig | LanguageConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    num_parameters: int,
    quantization: Quantization | None = None,
) -> Precision:
    """The dtypes for a device. ``dtype``: what the user wants for image encoder and language model.

    - CPU: bfloat16 for large models if the processor supports it, else float32; never float16.
    - GPU: float16 by default.
    - bfloat16 instead of float16 for a T5, whose feed-forward layers overflow in float16, and for other models that
      were trained in bfloat16 with larger values.
    - float32 between the linear layers of a quantised language model on a CPU, which costs nothing there.

    Raises `OptionError` for an unsupported dtype, and for an image encoder in 8 bits on a GPU.
    """
    is_cpu = device.type == "cpu"
    if quantization is not None and quantization.images and not is_cpu:
        raise OptionError(
            f"an image encoder in int8 ({option('vision')}, or a checkpoint saved in it) is for the CPU, but this one "
            f"is for {device}, which is faster without it; use the original, or {setting('device', 'cpu')}"
        )
    if dtype is None:
        dtype, reason = _by_default(is_cpu, num_parameters)
    elif dtype not in DTYPES:
        raise OptionError(f"dtype {dtype} is not supported; use float32, bfloat16 or float16")
    elif dtype == torch.float16 and is_cpu:
        raise OptionError(f"{option('dtype')} float16 is not supported on a CPU; use bfloat16 or float32")
    else:
        reason = f"{_name(dtype)} as requested"
    language = dtype
    spoken = config.language if isinstance(config, Blip2Config) else config
    if not isinstance(spoken, MatcherConfig) and spoken.overflows_in_float16 and dtype == torch.float16:
        language = torch.bfloat16
        reason += f"; bfloat16 in the language model, since a {spoken.kind} overflows in float16"
    tables = language
    if quantization is not None and "language" in quantization.parts and is_cpu:
        language = torch.float32
    return Precision(dtype, language, tables, reason)


def _by_default(is_cpu: bool, num_parameters: int) -> tuple[torch.dtype, str]:
    if not is_cpu:
        return torch.float16, "float16: the fastest on a GPU"
    if num_parameters < LARGE:
        return torch.float32, "float32: lower precision does not speed up a small model on a CPU"
    if has_bfloat16():
        return torch.bfloat16, "bfloat16: supported by this CPU"
    return torch.float32, "float32: this CPU does not support bfloat16"


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for matrix products in bfloat16."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
