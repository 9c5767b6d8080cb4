"""No precision by accident: under autocast, and with models that were cast, answers are those of the model, within
the rounding of the precision, or an error names the remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import blip2
from blip2 import checkpoint, linear, native
from blip2.errors import OptionError
from blip2.generation import Engine
from blip2.layers import KVCache, attend
from blip2.model import Blip2

HALVES = [torch.bfloat16, torch.float16]
PROMPTS = (3, 7, 5)
"""Lengths of a batch that is not even."""


def scores(model: Blip2, device: str = "cpu") -> Tensor:
    """Log-probabilities of fixed answers to a batch of unequal prompts behind images, as decoding computes them."""
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        pixels = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float32)
        images = model.prompt(model.encode(pixels.to(device)))
        rows = []
        for image_QD, length in zip(images, PROMPTS, strict=True):
            words = model.language.embed(torch.randint(5, 200, (length,), generator=generator).to(device))
            rows.append(torch.cat([image_QD, words.to(image_QD.dtype)]))
        answers = torch.randint(5, 200, (3, 4), generator=generator).tolist()
        return torch.tensor(Engine(model.language, eos_token_ids=[2]).score(rows, answers), dtype=torch.float32)


@pytest.fixture
def model(any_model) -> Blip2:
    return checkpoint.load(any_model, dtype=torch.float32)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", HALVES)
def test_decoding_under_autocast(any_model, dtype, quantize, packs, monkeypatch):
    if packs:
        monkeypatch.setattr(linear, "MIN_PACKED_WEIGHTS", 0)
    model = checkpoint.load(any_model, dtype=torch.float32, quantize=quantize)
    expected = scores(model)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(scores(model), expected, rtol=0.02, atol=0.2)
    torch.testing.assert_close(scores(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_people_call_under_autocast(dtype):
    """With the miniature, whose answers are right, and stay so."""
    model, matcher = blip2.load(), blip2.load("miniature-itm")
    pictures = ["examples/picture.png", "examples/cats.png"]
    plain = matcher.match(pictures, ["two dogs and a boat", "four cats"])
    with torch.autocast("cpu", dtype):
        assert model.caption(pictures[0], num_beams=1) == "a boat and two dogs"
        questions = ["how many dogs are in the picture?", "is there a boat?"]
        assert model.ask(pictures[0], questions, num_beams=1) == ["two", "yes"]
        assert model.ask(pictures[0], questions[1], choices=["yes", "no"]) == "yes"
        assert model.explain(pictures[1], question="how many cats are there?").heat.isfinite().all()
        found = matcher.match(pictures, ["two dogs and a boat", "four cats"])
    torch.testing.assert_close(found.itm_probability, plain.itm_probability, rtol=0, atol=0.05)
    torch.testing.assert_close(found.itc_cosine, plain.itc_cosine, rtol=0, atol=0.02)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_model_that_was_cast(any_model, cast, quantize):
    model = checkpoint.load(any_model, dtype=torch.float32, quantize=quantize)
    expected = scores(model)
    getattr(model, cast)()
    if cast == "half" and model.config.language.family == "t5":
        with pytest.raises(OptionError, match=r"T5 overflows in float16; use bfloat16"):
            scores(model)
        model.bfloat16()
    torch.testing.assert_close(scores(model), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("part", ["vision", "qformer", "projection", "language"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_part_that_was_cast(model, part, dtype):
    expected = scores(model)
    model.get_submodule(part).to(dtype)
    torch.testing.assert_close(scores(model), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("part", ["vision", "projection", "language"])
def test_one_part_in_float16(model, part):
    expected = scores(model)
    model.get_submodule(part).half()
    if part == "language" and model.config.language.family == "t5":
        with pytest.raises(OptionError, match="T5 overflows"):
            scores(model)
    else:
        torch.testing.assert_close(scores(model), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_kernels_look_at_every_operand(place, other):
    """Attention of one token, with one of query, keys, values and bias in another type."""
    operands = [torch.randn(2, 2, length, 8) for length in (1, 5, 5)] + [torch.randn(1, 1, 1, 5)]
    expected = attend(*operands[:3], mask=operands[3])
    mixed = copy.copy(operands)
    mixed[place] = mixed[place].to(other)
    if place == 3 or other == torch.float32:
        torch.testing.assert_close(attend(*mixed[:3], mask=mixed[3]), expected, rtol=0.01, atol=0.02)
        return
    assert not native.can_attend(*mixed)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own words
        attend(*mixed[:3], mask=mixed[3])
    if other == torch.float64:  # which autocast leaves alone
        return
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*mixed[:3], mask=mixed[3]).float()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)


def test_a_cache_takes_keys_of_another_type():
    cache = KVCache(
        [torch.nn.Linear(1, 1)], rows=2, num_heads=1, capacity=4, head_size=8, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    key, value = torch.randn(2, 2, 1, 2, 8).bfloat16()
    cache.write(0, key, value, cache.positions(2))
    cache.advance(torch.tensor([1, 2]), 2)
    cache.write(0, key[:, :, :1], value[:, :, :1], cache.positions(1))
    assert torch.equal(cache.keys[0][0, 0, 1], key[0, 0, 0].float())


def test_a_quantised_layer_keeps_the_precision_of_its_scales(any_model):
    language = checkpoint.load(any_model, quantize="int8").language
    before = {name: value.clone() for name, value in language.state_dict().items() if "scales" in name}
    for cast in (language.half, language.double, language.bfloat16, language.float):
        cast()
    after = language.state_dict()
    assert before
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_type_of_the_program_is_not_ours(any_model, dtype, tmp_path):
    """`torch.set_default_dtype` concerns the program's own tensors."""
    model = checkpoint.load(any_model, dtype=torch.float32)
    expected, [greatest] = scores(model), [native.greatest(torch.ones(3, 2, 8).half(), torch.ones(8))]
    pictures = ["examples/picture.png", "examples/cats.png"]
    blip, matcher = blip2.load(), blip2.load("miniature-itm")
    said = blip.caption(pictures), blip.ask(pictures[0], "is there a boat?", choices=["yes", "no"])
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(scores(checkpoint.load(any_model, dtype=torch.float32)), expected)
        found = native.greatest(torch.ones(3, 2, 8).half(), torch.ones(8, dtype=torch.float32))
        assert (found is None) == (greatest is None)
        assert found is None or torch.equal(found, greatest)
        assert (blip.caption(pictures), blip.ask(pictures[0], "is there a boat?", choices=["yes", "no"])) == said
        assert matcher.match(pictures, ["two dogs", "four cats"]).itm_probability.dtype == torch.float32
        blip2.Index.update(tmp_path / "some.index", "examples", matcher)
        index = blip2.Index.open(tmp_path / "some.index")
        assert index.search(matcher, "two dogs and a boat", k=1, rerank=2)[0].path.endswith("picture.png")
        assert index.near_duplicates(0.99) == []
    finally:
        torch.set_default_dtype(torch.float32)
