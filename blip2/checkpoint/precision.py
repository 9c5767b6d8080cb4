"""Which precision each part of a model has: a written policy, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blip2.checkpoint.quantize import Quantization
from blip2.config import Blip2Config, LanguageConfig, MatcherConfig
from blip2.errors import OptionError, option, setting

LARGE = 500_000_000
"""From so many parameters on, a CPU with bfloat16 arithmetic gains by it; below, conversions cost what it saves."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = ("language.token_embedding", "language.position_embedding")


@dataclass(frozen=True)
class Precision:
    """``vision`` and ``language`` compute in these; ``tables``: how the language model's embeddings are kept.

    Everything else (the Q-Former, its queries and heads, the projection) is float32: it is small, and its norms add
    1e-12. ``reason`` says in words why it is so.
    """

    vision: torch.dtype
    language: torch.dtype
    tables: torch.dtype
    reason: str

    def of(self, name: str) -> torch.dtype:
        """The precision of a parameter, by our name."""
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
    """The precision for a device, where ``dtype`` is what the user wants of image encoder and language model.

    - CPU: bfloat16 for large models where the processor computes in it, else float32; never float16.
    - GPU: float16 unless asked otherwise.
    - A T5 never runs in plain float16, in which its feed-forward layers overflow, nor do others that were trained in
      bfloat16 with larger numbers: bfloat16 in its place.
    - A quantised language model computes in float32 on a CPU between its linear layers, which costs nothing there.

    Raises `OptionError` for a dtype that cannot be, and for an image encoder in 8 bits on a GPU.
    """
    is_cpu = device.type == "cpu"
    if quantization is not None and quantization.images and not is_cpu:
        raise OptionError(
            f"an image encoder in int8 ({option('vision')}, or of a checkpoint that was saved so) is for the CPU, and "
            f"this one is to be on {device}, which is faster without; take the original, or {setting('device', 'cpu')}"
        )
    if dtype is None:
        dtype, reason = _by_default(is_cpu, num_parameters)
    elif dtype not in DTYPES:
        raise OptionError(f"dtype {dtype} is not a precision for this model; use float32, bfloat16 or float16")
    elif dtype == torch.float16 and is_cpu:
        raise OptionError(f"{option('dtype')} float16 is not for the CPU; use bfloat16 or float32")
    else:
        reason = f"{_name(dtype)} as asked for"
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
        return torch.float16, "float16: a GPU is fastest in it"
    if num_parameters < LARGE:
        return torch.float32, "float32: in a small model less precision gains nothing on a CPU"
    if has_bfloat16():
        return torch.bfloat16, "bfloat16: this CPU computes in it"
    return torch.float32, "float32: this CPU does not compute in bfloat16"


def has_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 by instructions of its own."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
