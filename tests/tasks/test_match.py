"""Matching: N images with M texts are N * M pairs, nothing is dropped, and the Q-Former writes captions by itself."""

from __future__ import annotations

import pytest
import torch

import blip2
from blip2.errors import ImageError, OptionError
from blip2.generation import finished
from blip2.tasks.match import Matches, portions
from tests import tiny

TEXTS = ["a dog", "two dogs and a red car on green", "where", "a photo of two dogs, where is it? on the left"]


@pytest.fixture(scope="module")
def matcher(matching_model):
    found = blip2.load(matching_model)
    found.model.qformer.reset_parameters(std=0.3)  # so that it looks, and texts differ
    return found


def test_every_image_with_every_text_as_each_pair_alone(matcher, pictures):
    together = matcher.match(pictures[:3], TEXTS)
    assert together.itm_probability.shape == together.itc_cosine.shape == (3, 4)
    assert together.itm_probability.std() > 1e-3 and together.itc_cosine.std() > 1e-3
    for row, picture in enumerate(pictures[:3]):
        for column, text in enumerate(TEXTS):
            alone = matcher.match(picture, text)
            torch.testing.assert_close(alone.itm_logits[0, 0], together.itm_logits[row, column], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone.itc_cosine[0, 0], together.itc_cosine[row, column], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_batch_size_changes_nothing(matcher, pictures, batch_size):
    expected = matcher.match(pictures[:2], TEXTS)
    found = matcher.match(pictures[:2], TEXTS, batch_size=batch_size)
    for name in ("itm_logits", "itc_cosine", "itc_probability"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)
    features = matcher.encode(pictures[:2])
    torch.testing.assert_close(
        matcher.reader.itm_logits(features, matcher.reader.ids(TEXTS[1:2]), batch_size)[:, 0],
        expected.itm_logits[:, 1], atol=1e-5, rtol=0,
    )  # fmt: skip


def test_no_token_of_a_text_is_dropped(matcher, pictures):
    """Another last word is another result, for the first text and for the last."""
    ends = ["two dogs and a red car", "two dogs and a red cat"]
    for texts in ([*ends, "a dog"], ["a dog", *ends]):
        found = matcher.match(pictures[0], texts)
        first, second = (texts.index(end) for end in ends)
        assert abs(found.itm_logits[0, first] - found.itm_logits[0, second]).max() > 1e-4
        assert found.itc_cosine[0, first] != found.itc_cosine[0, second]


def test_what_the_numbers_are(matcher, pictures):
    found = matcher.match(pictures[:2], TEXTS)
    images, texts = matcher.embed_images(pictures[:2]), matcher.embed_texts(TEXTS)
    assert images.shape == (2, 4, 8) and texts.shape == (4, 8)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2, 4))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(4))
    cosine = torch.stack([(image @ texts.T).amax(0) for image in images])
    torch.testing.assert_close(found.itc_cosine, cosine, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.itc_probability, (cosine / 0.07).softmax(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.itm_probability, found.itm_logits.softmax(-1)[..., 1])
    torch.testing.assert_close(found.score, found.itm_logits[..., 1] + cosine, atol=1e-6, rtol=0)


def test_one_or_many(matcher, pictures):
    assert matcher.embed_images(pictures[0]).shape == (4, 8)
    assert matcher.embed_texts("a dog").shape == (8,)
    assert matcher.embed_pairs(pictures[0], "a dog").shape == (4, 16)
    assert matcher.embed_pairs(pictures[:2], "a dog").shape == (2, 4, 16)
    pairs = matcher.embed_pairs(pictures[:2], TEXTS[:2])
    torch.testing.assert_close(pairs[1], matcher.embed_pairs(pictures[1], TEXTS[1]), atol=1e-5, rtol=0)
    itm = matcher.model.itm_head(pairs.to(matcher.model.itm_head.weight)).mean(1)
    torch.testing.assert_close(itm[1], matcher.match(pictures[:2], TEXTS).itm_logits[1, 1], atol=1e-5, rtol=0)


def test_encoded_once_the_image_encoder_rests(matcher, pictures, monkeypatch):
    seen = matcher.encode(pictures[:2])
    expected = matcher.match(pictures[:2], TEXTS)
    monkeypatch.setattr(matcher.model.vision, "forward", None)
    torch.testing.assert_close(matcher.match(seen, TEXTS).itm_logits, expected.itm_logits, atol=1e-5, rtol=0)


def test_files_without_a_temperature_give_no_itc_probability(matcher, pictures, monkeypatch):
    monkeypatch.setattr(matcher.model, "temperature", None)
    found = matcher.match(pictures[0], TEXTS)
    assert isinstance(found, Matches) and found.itc_probability is None and found.itc_cosine.shape == (1, 4)


@pytest.mark.parametrize(
    ("images", "texts", "words"),
    [
        (["nothing.png"], ["a dog"], "no such file"),
        ([], ["a dog"], "no image"),
        ([tiny.picture(1)], [], "no text"),
        ([tiny.picture(1)], ["a dog", " \n"], "one of the texts is empty"),
        ([tiny.picture(1)], ["dog " * 600], r"has \d+ tokens, but at most 62 are read; shorten it"),
    ],
)
def test_what_cannot_be_compared(matcher, images, texts, words):
    with pytest.raises((ImageError, OptionError), match=words):
        matcher.match(images, texts)


# ---- captions by the Q-Former alone ----


def test_captions_are_the_likeliest_words_of_the_caption_head(matcher, pictures):
    """Greedy, and each word checked against one pass over the whole text."""
    seen = matcher.encode(pictures[:3])
    captions = matcher.caption(seen, num_beams=1, max_new_tokens=6, min_new_tokens=6)
    assert captions == matcher.caption(pictures[:3], num_beams=1, max_new_tokens=6, min_new_tokens=6, batch_size=2)
    tokenizer, model = matcher.reader.tokenizer, matcher.model
    ruled_out = [tokenizer.token_id(name) for name in ("[PAD]", "[CLS]", "[DEC]", "[SEP]")]
    for image, caption in zip(seen, captions, strict=True):
        text = [tokenizer.token_id("[DEC]")]
        with torch.inference_mode():
            _, memory = model.embed_image(image.patches_PD[None])
            for _ in range(6):
                text_1T = torch.tensor([text])
                logits_V = model.caption_logits(text_1T, torch.ones_like(text_1T).bool(), memory)[0, -1]
                logits_V[ruled_out] = float("-inf")
                text.append(int(logits_V.argmax()))
        assert tokenizer.decode(text[1:]) == caption


def test_several_captions_of_one_picture(matcher, pictures):
    found = matcher.caption(pictures[0], num_beams=3, num_return=3, max_new_tokens=4)
    assert len(found) == 3 and all(isinstance(text, str) for text in found)


def test_files_without_a_caption_head(matcher, pictures, monkeypatch):
    monkeypatch.setattr(matcher.model, "lm_head", None)
    with pytest.raises(OptionError, match="lack the Q-Former's caption head"):
        matcher.caption(pictures[0])


def test_what_is_done_in_portions_is_what_is_done_at_once(matching_model):
    matcher = blip2.load(matching_model)
    texts = [" ".join(["dog"] * (1 + number * 7 % 28)) for number in range(70)]
    ids = matcher.reader.ids(texts)
    [image] = matcher.encode([tiny.picture(1)])
    runs = list(portions(ids))
    assert sorted(number for run in runs for number in run) == list(range(70))
    assert all(len(run) <= 16 and len(run) * max(len(ids[number]) for number in run) <= 512 for run in runs)
    assert len(list(portions([[1] * 2000] * 3))) == 3  # a long text by itself
    vectors = matcher.reader.embed_texts(ids)
    expected = matcher.reader.compare([image], ids, vectors)
    work = matcher.reader.comparing(image, ids)
    assert len([next(work) for _ in runs]) == len(runs) > 2
    found = finished(work)
    assert torch.allclose(found.itm_logits, expected.itm_logits, atol=1e-5)
    assert torch.allclose(found.itc_cosine, expected.itc_cosine, atol=1e-5)
    assert torch.allclose(finished(matcher.reader.embedding_texts(ids)), vectors, atol=1e-5)
