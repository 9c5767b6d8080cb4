"""All that a model does, on a device that refuses operands of two devices: the answers of the CPU, and few waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import blip2
from blip2 import checkpoint, placement
from blip2.generation import Batch, Engine, GenerateOptions
from tests.pretended import NAME, pretended
from tests.test_placement import DIVISIONS, divided

QUESTIONS = ["what colour is the car?", "how many dogs are there? and is there a cat on the left?", "where is it?"]


@pytest.fixture
def counts():
    with pretended() as counts:
        yield counts


# ---- the device itself --------------------------------------------------------------------------------


def test_it_computes_and_refuses_what_a_gpu_refuses(counts):
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device=NAME).view(2, 3)
    assert there.device.type == NAME and (there @ there.T).tolist() == (here @ here.T).tolist()
    assert (there + torch.tensor(1.0)).tolist() == (here + 1).tolist()
    index = there[0].long()
    for mixing in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here.index_select(0, index)):
        with pytest.raises(RuntimeError, match="two devices"):
            mixing()
    with torch.inference_mode():
        assert there[[1]].tolist() == here[[1]].tolist()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_it_counts_who_waits_for_values_and_what_is_sent(mode, counts):
    with mode():
        there = torch.zeros(3, device=NAME)
        assert counts.operations and not counts.waits and not counts.sent
        moved = torch.ones(3).to(NAME).to(NAME)
        there.copy_(torch.ones(3))
        there += torch.ones(3).to(there) - 1
        assert counts.sent.total() == 3 and not counts.waits
        for value in (there.sum().item(), there.tolist()[0], float(there.cpu()[0]), bool((there == moved).all())):
            assert value
        assert there.nonzero().shape == (3, 1)
        assert counts.waits.total() == 5 and counts.sent.total() == 3


# ---- inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4"))])
def test_what_a_generative_model_answers(any_model, pictures, quantize, counts):
    def answers(device):
        model = blip2.load(any_model, device=device, dtype="float32", quantize=quantize)
        short, some = {"max_new_tokens": 6}, pictures[:3]
        chat = model.chat(some[0], **short)
        return [
            model.caption(some, **short, num_beams=1),
            model.caption(some, **short, prompt="a photo of", num_captions=2, length_penalty=-1),
            model.caption(some, **short, stop="a", min_new_tokens=2, repetition_penalty=1.3, no_repeat_ngram_size=2),
            model.caption(some, **short, num_beams=1, sample=True, seed=3, top_k=20, top_p=0.9, min_p=0.01),
            model.caption(some, **short, num_beams=1, sample=True, seed=3, typical_p=0.9, temperature=0.7),
            model.ask(some, QUESTIONS, **short),
            model.ask(some, QUESTIONS[0], choices=["red", "green and white", "two dogs"]),
            chat.say(QUESTIONS[0]), list(chat.stream(QUESTIONS[2])),
        ], model.explain(some[0], question=QUESTIONS[0], answer="red").heat  # fmt: skip

    (words, heat), (expected, expected_heat) = answers(NAME), answers("cpu")
    assert words == expected
    torch.testing.assert_close(heat, expected_heat, rtol=0, atol=2e-3)


def test_what_a_matching_model_compares(matching_model, pictures, tmp_path, counts):
    texts = ["two dogs", "a red car on green", "is there a cat? no"]

    def found(device):
        model = blip2.load(matching_model, device=device, dtype="float32")
        blip2.Index.update(tmp_path / f"{device}.index", pictures[:4], model)
        index = blip2.Index.open(tmp_path / f"{device}.index")
        matches = model.match(pictures[:3], texts)
        return (
            [matches.itm_probability, matches.itc_cosine, model.embed_pairs(pictures[0], texts[0]).cpu()],
            [match.text for match in model.classify(pictures[0], texts, top=3, candidates=2)],
            model.explain(pictures[0], texts[1]).strongest,
            [hit.row for hit in index.search(model, texts[0])],
            [hit.row for hit in index.search(model, texts[1], rerank=3)],
            [hit.row for hit in index.search_picture(model, pictures[2])],
            model.caption(pictures[:2], max_new_tokens=5),
        )

    (numbers, *words), (expected_numbers, *expected_words) = found(NAME), found("cpu")
    torch.testing.assert_close(numbers, expected_numbers)
    assert words == expected_words


def test_an_index_is_asked(opt_model, pictures, tmp_path, counts):
    model = blip2.load(opt_model, device=NAME, dtype="float32")
    blip2.Index.update(tmp_path / "asked.index", pictures[:3], model)
    index = blip2.Index.open(tmp_path / "asked.index")
    expected = blip2.load(opt_model, device="cpu", dtype="float32").ask(index[:], QUESTIONS, max_new_tokens=4)
    assert model.ask(index[:], QUESTIONS, max_new_tokens=4) == expected


@pytest.mark.parametrize("moved", DIVISIONS.values(), ids=DIVISIONS.keys())
def test_a_divided_model_answers_as_a_whole_one(any_model, moved, counts):
    pytest.importorskip("accelerate")
    whole = checkpoint.load(any_model)
    found = replace(divided(whole, moved, NAME, "cpu"), dtype=torch.float32)
    if not found.is_split:
        pytest.skip("this family has no such layers")
    model = placement.load(any_model, found)
    pixels_BCHW = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)

    def answers(model):
        with torch.inference_mode():
            pixels = pixels_BCHW.to(model.vision.position_embedding.device)
            prompts = list(model.prompt(model.encode(pixels)))
        engine = Engine(model.language, eos_token_ids=[model.config.language.eos_token_id])
        return [
            [answer.tokens for answers in engine.generate(prompts, options) for answer in answers]
            for options in (GenerateOptions(max_new_tokens=5), GenerateOptions(max_new_tokens=5, num_beams=3))
        ]

    assert answers(model) == answers(whole)


# ---- how often it waits -------------------------------------------------------------------------------

DECODING = {
    "greedy": {},
    "with a filter": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 3},
    "stop": {"stop": ("zzz",)},
    "sampling": {"sample": True, "seed": 1, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.99},
    "beams": {"num_beams": 3},
    "beams that end early": {"num_beams": 3, "early_stopping": True, "num_return": 2},
}


@pytest.mark.parametrize("options", DECODING.values(), ids=DECODING.keys())
def test_a_step_of_a_batch_waits_once(any_model, options, counts):
    """For all rows together, of prompts of mixed length; and the weights of the prompt, and the end, a few times."""
    language = checkpoint.load(any_model, device=NAME, dtype=torch.float32).language
    engine = Engine(language, eos_token_ids=[], decode=str)
    width = language.embed(torch.zeros(1, 1, dtype=torch.long, device=NAME)).shape[-1]
    prompts = [torch.linspace(-1, 1, length * width).view(length, width).to(NAME) for length in (7, 3, 5)]

    def waits(num_tokens):
        counts.clear()
        engine.generate(prompts, GenerateOptions(max_new_tokens=num_tokens, **options))
        return counts.waits.total()

    few, many = waits(4), waits(14)
    assert many - few == 10
    assert few - 4 <= 1 + 4 * len(prompts) * ("num_beams" in options), "before the first token, and for the answers"


def test_a_step_with_the_likeliest_tokens_waits_once(opt_model, counts):
    language = checkpoint.load(opt_model, device=NAME, dtype=torch.float32).language
    engine = Engine(language, eos_token_ids=[])
    counts.clear()
    batch = Batch(language)
    job = engine.job([torch.ones(3, 24, device=NAME)], GenerateOptions(max_new_tokens=6), num_top=5)
    batch.add([job])
    while not job.is_over:
        batch.step()
    assert counts.waits.total() <= 6 + 1
    [[answer]] = job.answers()
    assert [len(place) for place in answer.top] == [5] * 6
    assert all(token in place for token, place in zip(answer.tokens, answer.top, strict=True))
