"""The precision of each part: what is chosen on which device, and that no T5 overflows by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blip2.checkpoint import precision
from blip2.checkpoint.precision import LARGE, choose_precision
from blip2.checkpoint.quantize import Quantization
from blip2.config import Blip2Config, MatcherConfig, T5Config
from blip2.errors import OptionError
from blip2.language import T5
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OPT, FLAN_T5 = Blip2Config(), Blip2Config(language=T5Config())
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
MANY = 4 * LARGE


@pytest.mark.parametrize(
    ("config", "device", "asked", "has_bfloat16", "vision", "language"),
    [
        (OPT, CPU, None, True, BF16, BF16),
        (OPT, CPU, None, False, FP32, FP32),
        (OPT, CPU, FP32, True, FP32, FP32),
        (OPT, CPU, BF16, False, BF16, BF16),
        (OPT, GPU, None, True, FP16, FP16),
        (OPT, GPU, BF16, True, BF16, BF16),
        (FLAN_T5, CPU, None, True, BF16, BF16),
        (FLAN_T5, GPU, None, True, FP16, BF16),
        (FLAN_T5, GPU, FP16, True, FP16, BF16),
        (FLAN_T5, GPU, FP32, True, FP32, FP32),
    ],
)
def test_what_is_chosen(config, device, asked, has_bfloat16, vision, language, monkeypatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has_bfloat16)
    chosen = choose_precision(config, device, asked, num_parameters=MANY)
    assert (chosen.vision, chosen.language, chosen.tables) == (vision, language, language)
    assert chosen.of("vision.blocks.0.fc1.weight") == vision
    assert chosen.of("language.token_embedding.weight") == language
    assert chosen.of("qformer.query_tokens") == chosen.of("projection.weight") == FP32
    assert chosen.reason


def test_a_small_model_is_in_float32_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    assert choose_precision(OPT, CPU, None, num_parameters=LARGE - 1).language == FP32


def test_between_quantised_layers_a_cpu_computes_in_float32() -> None:
    chosen = choose_precision(FLAN_T5, CPU, BF16, num_parameters=MANY, quantization=Quantization(8))
    assert (chosen.vision, chosen.language, chosen.tables) == (BF16, FP32, BF16)
    chosen = choose_precision(FLAN_T5, GPU, None, num_parameters=MANY, quantization=Quantization(8))
    assert (chosen.vision, chosen.language, chosen.tables) == (FP16, BF16, BF16)


def test_a_matcher_has_a_precision_for_its_image_encoder() -> None:
    assert choose_precision(MatcherConfig(), GPU, None, num_parameters=MANY).vision == FP16


@pytest.mark.parametrize(("device", "dtype"), [(CPU, FP16), (GPU, torch.float64), (CPU, torch.int8)])
def test_what_cannot_be_is_refused(device, dtype) -> None:
    with pytest.raises(OptionError, match="float"):
        choose_precision(OPT, device, dtype, num_parameters=MANY)


@torch.no_grad()
def test_a_t5_that_overflows_in_float16_does_not_in_what_is_chosen() -> None:
    """As Flan-T5's feed-forward layers do: their outputs pass 65,504, the largest number in float16."""
    torch.manual_seed(0)
    language = T5(tiny.language_config("t5")).eval()
    for block in [*language.encoder, *language.decoder]:
        block.feed_forward.down.weight *= 3e5
    prompt_BPD, lengths_B = torch.randn(2, 5, 24), torch.tensor([5, 3])
    exact = language.prefill(prompt_BPD, lengths_B, 2)[0]
    assert exact.isfinite().all()

    def logits(dtype: torch.dtype) -> torch.Tensor:
        return language.to(dtype).prefill(prompt_BPD.to(dtype), lengths_B, 2)[0].float()

    with pytest.raises(OptionError, match="T5 overflows in float16"):
        logits(FP16)
    config = replace(FLAN_T5, language=language.config)
    chosen = choose_precision(config, GPU, FP16, num_parameters=MANY).language
    language.float()
    for block in [*language.encoder, *language.decoder]:  # float16 has lost what was beyond its range
        block.feed_forward.down.weight.nan_to_num_(0, 6e4, -6e4)
    half = logits(chosen)
    assert half.isfinite().all()
