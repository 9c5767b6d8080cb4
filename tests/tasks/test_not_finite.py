"""No answer, score or vector is made of what is NaN or infinite: each is an error that names the cause."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blip2
from blip2 import EncodedImage
from blip2.errors import CheckpointError, ImageError, ImageNotFiniteError, NotFiniteError
from blip2.layers import attend
from tests import tiny

SPOKEN = {
    "caption": lambda pipe, image: pipe.caption(image),
    "greedy": lambda pipe, image: pipe.caption(image, num_beams=1),
    "samples": lambda pipe, image: pipe.caption(image, num_captions=2, sample=True, seed=1),
    "ask": lambda pipe, image: pipe.ask(image, "how many dogs?"),
    "choices": lambda pipe, image: pipe.ask(image, "is it day?", choices=["yes", "no"]),
    "rank": lambda pipe, image: pipe.rank(image, "is it day?", ["yes", "no"]),
    "say": lambda pipe, image: pipe.chat(image).say("how many dogs?"),
    "stream": lambda pipe, image: list(pipe.chat(image).stream("how many dogs?")),
    "explain": lambda pipe, image: pipe.explain(image, caption="two dogs"),
    "explain own": lambda pipe, image: pipe.explain(image, question="how many dogs?"),
}
MATCHED = {
    "match": lambda matcher, image: matcher.match(image, ["two dogs", "a red car"]),
    "match one": lambda matcher, image: matcher.match([image, image], "two dogs"),
    "classify": lambda matcher, image: matcher.classify(image, ["two dogs", "a red car", "green"], top=1),
    "pairs": lambda matcher, image: matcher.embed_pairs(image, "two dogs"),
    "explain": lambda matcher, image: matcher.explain(image, "two dogs"),
    "images": lambda matcher, image: matcher.embed_images(image),
    "texts": lambda matcher, image: matcher.embed_texts("two dogs"),
}


@pytest.fixture
def pipe(any_model):
    return blip2.load(any_model)


@pytest.fixture
def matcher(matching_model):
    return blip2.load(matching_model)


def spoil(parameter, value=math.nan):
    with torch.no_grad():
        parameter.view(-1)[0] = value


@pytest.mark.parametrize("way", SPOKEN)
def test_damage_in_the_language_model(pipe, way):
    image = tiny.picture(1)
    language = pipe.speaker.model.language
    spoil((language.final_norm if hasattr(language, "final_norm") else language.decoder_norm).weight)
    with pytest.raises(NotFiniteError, match=r"_norm.weight .in files: language_model") as raised:
        SPOKEN[way](pipe, image)
    assert "the model is damaged, download it again" in str(raised.value) and "\n" not in str(raised.value)
    assert not isinstance(raised.value, ImageError)  # the image is as good as others


@pytest.mark.parametrize("way", SPOKEN)
def test_damage_in_the_image_encoder(pipe, way):
    spoil(pipe.speaker.model.vision.blocks[0].fc1.bias, math.inf)
    with pytest.raises(NotFiniteError, match=r"vision.blocks.0.fc1.bias") as raised:
        SPOKEN[way](pipe, tiny.picture(1))
    assert not isinstance(raised.value, ImageError)


@pytest.mark.parametrize("last", ["query", "key"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_attention_does_not_swallow_it(pipe, last, value):
    """Torch answers 0 where all scores are minus infinity, or NaN of few keys."""
    with torch.no_grad():
        for layer in pipe.speaker.model.qformer.layers:
            getattr(layer.self_attention, last).bias[0] = value
    with pytest.raises(NotFiniteError, match=f"self_attention.{last}.bias"):
        pipe.caption(tiny.picture(1))


@pytest.mark.parametrize("scored", [math.nan, -math.inf])
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_to_few(is_causal, scored):
    query, key, value = torch.rand(3, 2, 2, 5, 8) + 0.1
    query[0, 0, :, 0], key[0, 0, :, 0] = 1, scored
    found = attend(query, key, value, is_causal=is_causal).unflatten(-1, (2, 8))
    assert found[0, :, 0].isnan().all()
    assert found[0, :, 1].isfinite().all() and found[1].isfinite().all()


def test_an_infinite_temperature(matcher):
    matcher.model.temperature = torch.nn.Parameter(torch.tensor(math.inf))
    with pytest.raises(NotFiniteError, match=r"temperature .in files: temp. has such values"):
        matcher.match(tiny.picture(1), ["two dogs", "a red car"])


def test_a_bias_of_minus_infinity_is_told_at_the_start(any_model, tmp_path):
    """Behind a ReLU, among the positions of a T5, or in a norm, it changes answers that are numbers still."""
    folder = shutil.copytree(any_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    ends = ("1.fc1.bias", "relative_attention_bias.weight", "1.self_attn.q_norm.weight", "1.input_layernorm.weight")
    name = next(name for name in tensors if name.endswith(ends))
    tensors[name].view(-1)[0] = -math.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name}: a weight is NaN or infinite"):
        blip2.load(folder)


@pytest.mark.parametrize("way", MATCHED)
def test_damage_in_a_matching_model(matcher, way):
    """In a part that this way needs."""
    part, name = {
        "images": (matcher.model.vision_projection, "vision_projection.weight"),
        "texts": (matcher.model.text_projection, "text_projection.weight"),
        "pairs": (matcher.model.qformer.word_embedding, "qformer.word_embedding.weight"),
    }.get(way, (matcher.model.itm_head, "itm_head.weight"))
    with torch.no_grad():
        part.weight.fill_(math.nan)
    with pytest.raises(NotFiniteError, match=name):
        MATCHED[way](matcher, tiny.picture(1))


def test_an_encoded_image_that_is_no_numbers(pipe, tmp_path):
    image = pipe.encode(tiny.picture(1))
    expected = pipe.caption(image)
    image.queries_QD[0, 0] *= 1e6
    with pytest.raises(ImageNotFiniteError, match=r"not written, .* in float16; save it without half"):
        image.save(tmp_path / "image", half=True)
    bad = EncodedImage(torch.full_like(image.queries_QD, math.nan), image.model)
    with pytest.raises(ImageNotFiniteError, match="not written"):
        bad.save(tmp_path / "image")
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotFiniteError, match="an encoded image; encode the image again"):
        pipe.caption(bad)
    assert pipe.caption(tiny.picture(1)) == expected


@pytest.mark.parametrize("folder", ["opt_model", "matching_model"])
def test_a_picture_that_overflows_is_one_that_cannot_be_read(request, folder, pictures):
    """The others are; and nothing is wrong with the model."""
    model = blip2.load(request.getfixturevalue(folder))
    expected = model.encode(pictures[:3])
    plain = model.frontend._encode_pixels
    overflows = model.frontend.pixels(pictures[1])

    def encode(pixels_BCHW):
        for pixels_CHW, kept in zip(pixels_BCHW, plain(pixels_BCHW), strict=True):
            if torch.equal(pixels_CHW, overflows):
                next(iter(vars(kept).values()))[0, 0] = math.inf
            yield kept

    model.frontend._encode_pixels = encode
    first, second, third = model.each_encoded(pictures[:3], on_error="return")
    assert isinstance(second, ImageNotFiniteError)
    assert str(second).startswith(f"{pictures[1]}: its features are NaN or infinite: numbers overflow")
    for seen, wanted in ((first, expected[0]), (third, expected[2])):
        torch.testing.assert_close(next(iter(vars(seen).values())), next(iter(vars(wanted).values())))
    with pytest.raises(ImageNotFiniteError):
        model.encode(pictures[:3])
