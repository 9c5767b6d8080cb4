"""On a GPU: the answers of the CPU, the same in a batch as alone, in every precision; a T5 in float16 is refused.

Skipped where there is no GPU. `pytest tests/test_gpu.py` runs them all; they take a minute.
"""

from __future__ import annotations

import copy

import pytest
import torch

import blip2
from blip2 import checkpoint
from blip2.errors import OptionError
from blip2.generation import replay
from tests import tiny
from tests.test_mixed_precision import scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = "cuda:0"
PICTURES = ["examples/picture.png", "examples/cats.png", "examples/flowers.png"]
QUESTIONS = ["how many dogs are in the picture?", "is there a boat?", "what color is the background of the picture?"]


def answers(model: blip2.Pipeline) -> list[object]:
    return [
        model.caption(PICTURES),
        model.caption(PICTURES, num_beams=1),
        model.ask(PICTURES[0], QUESTIONS, num_beams=1),
        model.ask(PICTURES[0], QUESTIONS[1], choices=["yes", "no"]),
        model.caption(PICTURES[0], sample=True, seed=1, num_captions=2),
    ]


def test_the_miniature_answers_as_on_the_cpu():
    expected = answers(blip2.load(device="cpu"))
    assert answers(blip2.load(device="cuda", dtype="float32")) == expected
    half = blip2.load(device="cuda")
    assert half.caption(PICTURES[0], num_beams=1) == expected[1][0]
    assert half.ask(PICTURES[0], QUESTIONS[:2], num_beams=1) == expected[2][:2]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_alone_or_in_company(dtype):
    model = blip2.load(device="cuda", dtype=dtype)
    images = model.encode(PICTURES)
    together = model.ask(images, QUESTIONS, num_beams=1)
    assert together == [model.ask(image, text, num_beams=1) for image, text in zip(images, QUESTIONS, strict=True)]


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_recorded_steps_answer_as_plain_ones(monkeypatch, quantize):
    """Greedily, with beams, sampled; again and again, so that what was recorded is used by others."""
    model = blip2.load(device="cuda", dtype="float32", quantize=quantize)
    monkeypatch.setenv(replay.SWITCH, "0")
    expected = answers(model)
    records = replay.replay_of(model.speaker.model.language)._records
    assert not records
    monkeypatch.delenv(replay.SWITCH)
    assert [answers(model) for _ in range(5)] == [expected] * 5
    assert len(records) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_have_the_logits_of_plain_ones(any_model, monkeypatch, dtype):
    language = checkpoint.load(any_model, device=GPU, dtype=dtype).language
    torch.manual_seed(0)
    width = language.embed(torch.zeros(1, 1, dtype=torch.long, device=GPU)).shape[-1]
    prompt_BTD = torch.randn(5, 9, width, device=GPU, dtype=dtype)
    lengths_B = torch.tensor([9, 3, 7, 9, 1], device=GPU)

    def logits(step):
        found_RV, state = language.prefill(prompt_BTD, lengths_B, 14)
        each = [found_RV]
        for place in range(12):
            if place == 8:  # rows end, and one goes on twice
                rows = torch.tensor([4, 0, 0], device=GPU)
                state.select(rows)
                found_RV = found_RV[rows]
            found_RV = step(found_RV.argmax(-1), state)
            each.append(found_RV)
        return each

    with torch.inference_mode():
        expected = logits(language.step)
        steps = replay.Replay(language)
        for _ in range(3):
            for found, plain in zip(logits(steps.step), expected, strict=True):
                torch.testing.assert_close(found, plain, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-1)
        assert len(steps._records) == 2


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised(any_model, quantize):
    expected = scores(checkpoint.load(any_model, dtype=torch.float32, quantize=quantize))
    found = scores(checkpoint.load(any_model, device=GPU, dtype=torch.float32, quantize=quantize), GPU)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_casts(any_model, dtype):
    model = checkpoint.load(any_model, device=GPU, dtype=torch.float32)
    expected = scores(checkpoint.load(any_model, dtype=torch.float32))
    torch.testing.assert_close(scores(model, GPU), expected, rtol=1e-4, atol=1e-3)
    with torch.autocast("cuda", dtype):
        torch.testing.assert_close(scores(model, GPU), expected, rtol=0.02, atol=0.2)
    twin = copy.deepcopy(model).to(dtype)
    if dtype == torch.float16 and model.config.language.family == "t5":
        with pytest.raises(OptionError, match="T5 overflows in float16"):
            scores(twin, GPU)
    else:
        torch.testing.assert_close(scores(twin, GPU), expected, rtol=0.02, atol=0.2)


def test_there_and_back(any_model, monkeypatch):
    monkeypatch.setattr("blip2.linear.MIN_PACKED_WEIGHTS", 0)
    model = checkpoint.load(any_model, dtype=torch.float32)
    expected = scores(model)
    model.to(GPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    torch.testing.assert_close(scores(model, GPU), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores(model.to("cpu")), expected, rtol=1e-4, atol=1e-4)


def test_matching():
    texts = ["two dogs and a boat", "four cats", "a flower"]
    expected = blip2.load("miniature-itm", device="cpu").match(PICTURES, texts)
    for dtype, atol in (("float32", 1e-4), ("float16", 0.02)):
        found = blip2.load("miniature-itm", device="cuda", dtype=dtype).match(PICTURES, texts)
        torch.testing.assert_close(found.itm_probability, expected.itm_probability, rtol=0, atol=atol)
        torch.testing.assert_close(found.itc_cosine, expected.itc_cosine, rtol=0, atol=atol)


def test_learning(any_model):
    """One step of the drop-in model on the GPU moves what one on the CPU moves."""
    moved = []
    for device in ("cpu", GPU):
        model = checkpoint.load(any_model, device=device, dtype=torch.float32)
        learner = torch.optim.SGD(model.qformer.parameters(), lr=0.1)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        model.prompt(model.encode(pixels)).square().mean().backward()
        learner.step()
        moved.append(model.qformer.query_tokens.detach().cpu())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_drop_in_beside_transformers(any_model, dtype):
    """The same ids and losses on the GPU, also under autocast; a T5 in float16 is computed in bfloat16."""
    transformers = pytest.importorskip("transformers")
    models = [
        library.Blip2ForConditionalGeneration.from_pretrained(any_model, dtype=dtype, device_map={"": 0}).eval()
        for library in (transformers, blip2)
    ]
    processor = blip2.Blip2Processor.from_pretrained(any_model)
    pictures = [tiny.picture(seed) for seed in range(2)]
    texts = ["Question: how many dogs are there? Answer:", "a photo of"]
    inputs = processor(pictures, texts, return_tensors="pt", padding=True).to(GPU, dtype)
    losses = [float(model(**inputs, labels=inputs["input_ids"]).loss) for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype == torch.float32 else 0.03)
    if dtype != torch.float32:  # rounding decides between tokens of random models
        return
    for options in ({}, {"num_beams": 3}, {"return_dict_in_generate": True, "output_scores": True}):
        theirs, ours = (model.generate(**inputs, max_new_tokens=8, **options) for model in models)
        ids = [found if isinstance(found, torch.Tensor) else found.sequences for found in (theirs, ours)]
        assert torch.equal(*ids)
    with torch.autocast("cuda", torch.bfloat16):
        losses = [float(model(**inputs, labels=inputs["input_ids"]).loss) for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
