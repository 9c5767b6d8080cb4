"""Where a model looks: the gradient is the slope of the score, and the map belongs to the image and the text."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import blip2
from blip2.errors import ImageError, OptionError
from blip2.generation import finished
from blip2.language.t5 import RMSNorm
from blip2.tasks import explain
from blip2.tasks.explain import ImagePatches, evidence, find_word, heat_map
from blip2.tasks.match import Reader
from blip2.tasks.speaker import Speaker
from blip2.text import Tokenizer, question_prompt
from tests import tiny


@pytest.fixture(scope="module")
def matcher(matching_model):
    found = blip2.load(matching_model)
    found.model.qformer.reset_parameters(std=0.3)  # so that it looks, and texts differ
    return found


@pytest.fixture(scope="module")
def blip(any_model):
    return blip2.load(any_model)


def wide(seed: int, width: int = 90, height: int = 50) -> Image.Image:
    return tiny.picture(seed).resize((width, height))


# ---- the map ------------------------------------------------------------------------------------------


def test_a_match_has_a_map_of_the_pictures_own_size(matcher):
    found = matcher.explain(wide(1), " a  dog")
    assert (found.heat.shape, found.heat.dtype, found.text) == ((50, 90), torch.float32, "a dog")
    assert found.heat.min() >= 0 and found.heat.max() == 1
    x, y = found.strongest
    assert found.heat[y, x] == 1
    assert found.score == pytest.approx(float(matcher.match(wide(1), "a dog").itm_probability), abs=1e-5)
    assert not torch.equal(found.heat, matcher.explain(wide(1), "where").heat)
    assert not torch.equal(found.heat, matcher.explain(wide(2), "a dog").heat)
    assert torch.equal(found.heat, matcher.explain(wide(1), "a dog").heat)


def test_an_answer_has_a_map_and_its_log_probability(blip):
    own = blip.explain(wide(1), question="is it red?")
    [[answer]] = blip.each_answer(wide(1), "is it red?")
    assert own.text == answer.text
    assert own.heat.shape == (50, 90) and own.heat.min() >= 0 and own.heat.max() == 1
    given = blip.explain(wide(1), question="is it red?", answer="on the left")
    assert given.text == "on the left" and not torch.equal(given.heat, own.heat)
    assert torch.equal(given.heat, blip.explain(wide(1), question="is it red?", answer="on the left").heat)
    speaker = blip.speaker
    tokens = speaker.tokenizer.answer_ids("on the left", speaker.model.config.language)[:-1]
    text = question_prompt("is it red?", speaker.model.config.manner)
    prompt = speaker.prompt(blip.encode(wide(1)), text, 8)
    assert given.score == pytest.approx(speaker.engine.score([prompt], [tokens])[0], abs=1e-4)


def test_a_word_and_the_caption_that_it_stands_in(blip):
    caption = "two dogs and a red car"
    whole = blip.explain(wide(1), caption=caption)
    dogs, car = (blip.explain(wide(1), word=word, caption=caption) for word in ("DOGS", "car"))
    assert (whole.text, dogs.text, car.text) == (caption, "dogs", "car")
    assert whole.score < min(dogs.score, car.score) < 0
    assert not torch.equal(dogs.heat, car.heat)
    # What is written after a word has no part in its probability.
    shorter = blip.explain(wide(1), word="dogs", caption="two dogs")
    assert shorter.score == pytest.approx(dogs.score, abs=1e-4)
    torch.testing.assert_close(shorter.heat, dogs.heat, atol=1e-3, rtol=0)
    assert blip.explain(wide(1)).text == blip.caption(wide(1))


def test_any_source_of_the_picture(matcher):
    image = wide(3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    maps = [matcher.explain(source, "a dog").heat for source in (image, buffer.getvalue(), np.asarray(image))]
    assert all(torch.equal(heat, maps[0]) for heat in maps)


def test_a_blank_picture_speaks_for_nothing(matcher):
    """All of the mean colour: there is no way to go, and no patch that differs; of numbers no NaN."""
    blank = Image.new("RGB", (30, 20), (122, 117, 104))
    heat = matcher.explain(blank, "a dog").heat
    assert heat.shape == (20, 30) and not heat.isnan().any()
    assert torch.equal(heat_map(torch.zeros(5), 20, 30), torch.zeros(20, 30))
    assert matcher.explain(blank, "a dog").overlay().size == (30, 20)


def test_heat_lies_where_its_patch_is():
    heat = heat_map(torch.tensor([9.0, 0, 0, 1, 0]), 40, 60)  # the class token, then the patches row by row
    y, x = divmod(int(heat.argmax()), 60)
    assert y >= 20 and x < 30 and heat[5, 50] < 0.05


# ---- the gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["match", "opt", "t5", "llama"])
def test_the_evidence_is_the_slope_of_the_score(family, matcher, monkeypatch):
    """By finite differences, in double precision."""
    monkeypatch.setattr(explain, "NUM_STEPS", 1)
    # T5's norms take single precision whatever they are given, in which differences drown.
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.eps))
    caught = {}
    gathering = explain.gathering
    monkeypatch.setattr(explain, "gathering", lambda *given: caught.update(given=given) or gathering(*given))
    patches = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    image_patches = ImagePatches(wide(1), *patches)
    if family == "match":
        reader = Reader(copy.deepcopy(matcher.model).double(), matcher.reader.tokenizer)
        explain.explain_match(reader, image_patches, "a dog on green")
    else:
        tokenizer = Tokenizer(tiny.tokenizer_of(family))
        speaker = Speaker(tiny.generative(family).double(), tokenizer, None)
        explain.explain_words(speaker, image_patches, explain.Words("is it red?", "on the left"))

    score, _, config, *_ = caught["given"]
    found_P, value = evidence(score, image_patches, config)
    bias = torch.zeros(1, 1, 2, 4, 5, dtype=torch.float64)
    slopes = torch.empty_like(bias)
    with torch.no_grad():
        assert float(score(image_patches.patches_PD[None], bias)) == pytest.approx(value, abs=1e-6)
        for place in np.ndindex(*bias.shape):
            step = torch.zeros_like(bias)
            step[place] = 1e-4
            ahead, behind = score(image_patches.patches_PD[None], step), score(image_patches.patches_PD[None], -step)
            slopes[place] = (ahead - behind) / 2e-4
    assert slopes.abs().max() > 1e-3
    torch.testing.assert_close(found_P, slopes.sum((1, 3)).relu().sum((0, 1)), atol=1e-6, rtol=1e-3)


def test_a_hidden_patch_gets_no_heat(matcher):
    image_patches = ImagePatches(wide(1), *torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)))
    text_1T = torch.tensor([matcher.reader.ids(["a dog"])[0]])

    def score(patches_SPD, bias, hidden=None):
        hide = torch.zeros(5)
        hide[hidden or []] = float("-inf")
        text_ST = text_1T.expand(len(patches_SPD), -1)
        return matcher.model.match(patches_SPD, text_ST, torch.ones_like(text_ST).bool(), image_bias=bias + hide)[:, 1]

    config = matcher.model.config.qformer
    seen_P, _ = evidence(score, image_patches, config)
    assert (seen_P >= 0).all() and seen_P.max() > 0
    for patch in range(1, 5):
        found_P, _ = evidence(lambda patches, bias, patch=patch: score(patches, bias, [patch]), image_patches, config)
        assert found_P[patch] == 0 and found_P.isfinite().all() and found_P.max() > 0


def test_the_model_is_as_it_was(matcher, blip):
    for model, ask in (
        (matcher.model, lambda: matcher.explain(wide(1), "a dog")),
        (blip.speaker.model, lambda: blip.explain(wide(1), question="is it red?")),
    ):
        before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
        with torch.inference_mode():
            found = ask()
        assert not found.heat.requires_grad and torch.is_grad_enabled()
        for name, value in model.named_parameters():
            assert value.grad is None and value.requires_grad == before[name][1]
            assert torch.equal(value, before[name][0])


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}])
def test_gradients_go_through_models_of_few_bits(any_model, options):
    exact = blip2.load(any_model).explain(wide(1), question="is it red?", answer="on the left").heat
    found = blip2.load(any_model, **options).explain(wide(1), question="is it red?", answer="on the left").heat
    assert found.dtype == torch.float32 and found.max() == 1
    assert np.corrcoef(found.flatten(), exact.flatten())[0, 1] > 0.5


# ---- words --------------------------------------------------------------------------------------------


def test_a_word_is_found_by_its_tokens():
    tokenizer = Tokenizer(tiny.opt_tokenizer())
    tokens = tokenizer.encode(" two dogs and naïve 🐕 dog")
    for word, said in (("dogs", "dogs"), ("naïve", "naïve"), ("🐕", "🐕"), ("dog", "dog"), ("two dogs", "two dogs")):
        assert tokenizer.decode(tokens[find_word(tokens, tokenizer.decode, word)]) == said
    assert find_word(tokens, tokenizer.decode, "dog").stop == len(tokens)  # and not the beginning of "dogs"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"word": "cat", "caption": "two dogs"}, "the word 'cat' is not in the caption 'two dogs'"),
        ({"word": "dog", "caption": "two dogs"}, "is not in the caption"),
        ({"word": " ", "caption": "two dogs"}, "the word is empty"),
        ({"caption": " "}, "the caption is empty"),
        ({"question": " "}, "the question is empty"),
        ({"question": "is it?", "answer": ""}, "the answer is empty"),
        ({"answer": "two"}, "needs a question"),
        ({"question": "is it?", "word": "dogs"}, "leave out word and caption"),
    ],
)
def test_what_cannot_be_explained(blip, arguments, words):
    with pytest.raises(OptionError, match=words):
        blip.explain(wide(1), **arguments)


def test_pictures_that_cannot_be_explained(blip, matcher):
    with pytest.raises(ImageError, match=r"nothing\.png: no such file"):
        blip.explain("nothing.png")
    with pytest.raises(ImageError, match="give the image itself"):
        blip.explain(blip.encode(wide(1)))
    with pytest.raises(ImageError, match="give the image itself"):
        matcher.explain(matcher.encode(wide(1)), "a dog")
    with pytest.raises(OptionError, match="texts is empty"):
        matcher.explain(wide(1), " ")


def test_an_explanation_in_portions_is_the_same(matcher, blip):
    seen = explain.image_patches(wide(1), matcher.frontend, matcher.model.encode)
    work = explain.explaining_match(matcher.reader, seen, "a dog")
    assert [next(work) for _ in range(explain.NUM_STEPS)] == [None] * explain.NUM_STEPS
    found, expected = finished(work), matcher.explain(wide(1), "a dog")
    assert found.score == pytest.approx(expected.score, abs=1e-5)
    assert torch.allclose(found.heat, expected.heat, atol=1e-3)
    seen = explain.image_patches(wide(1), blip.frontend, blip.speaker.model.patches)
    found, expected = finished(explain.explaining_words(blip.speaker, seen, explain.Words())), blip.explain(wide(1))
    assert (found.text, found.score) == (expected.text, pytest.approx(expected.score, abs=1e-4))
    assert torch.allclose(found.heat, expected.heat, atol=1e-3)
