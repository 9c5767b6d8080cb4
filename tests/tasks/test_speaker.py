"""From pairs of image and text to answers: what is read, in which order, and what does not fit."""

import pytest
import torch

from blip2.encoded import EncodedImage
from blip2.errors import OptionError
from blip2.generation import Engine, GenerateOptions, Hypothesis
from blip2.tasks.ask import ask, check_choices, rank
from blip2.tasks.caption import caption
from blip2.tasks.defaults import ASK, BATCH_SIZE, CAPTION, CHAT, merged
from blip2.tasks.speaker import Speaker, num_pairs, pairs
from blip2.text import Tokenizer
from tests import tiny


class Recorder:
    """An engine that answers with the number of each call's prompts, and remembers what it was given."""

    def __init__(self):
        self.prompts = []
        self.batches = []
        self.options = []

    def generate(self, prompts, options, *, on_token=None):
        self.prompts += prompts
        self.batches.append(len(prompts))
        self.options.append(options)
        return [[Hypothesis([66 + len(self.prompts)], 0.0, "eos")] * options.num_return for _ in prompts]

    def score(self, prompts, answers):
        self.prompts += prompts
        self.batches.append(len(prompts))
        return [-float(sum(answer)) for answer in answers]


@pytest.fixture(params=["opt", "t5", "llama"])
def speaker(request):
    return Speaker(tiny.generative(request.param), Tokenizer(tiny.tokenizer_of(request.param)), Recorder())


def images(number):
    torch.manual_seed(1)
    return [EncodedImage(torch.randn(4, 16)) for _ in range(number)]


def text_read(speaker, prompt_TD):
    """The words of a prompt, found again in the table of embeddings."""
    table_VD = speaker.model.language.token_embedding.weight
    return [int((table_VD - vector).abs().sum(-1).argmin()) for vector in prompt_TD[4:]]


def test_a_prompt_is_the_image_then_the_text(speaker):
    [image] = images(1)
    prompt_TD = speaker.prompt(image, "two dogs", 10)
    assert torch.equal(prompt_TD[:4], speaker.model.prompt(image.queries_QD))
    config = speaker.model.config.language
    assert text_read(speaker, prompt_TD) == speaker.tokenizer.prompt_ids("two dogs", config)


def test_captions_need_no_text(speaker):
    [[answer]] = caption(speaker, images(1))
    [prompt_TD] = speaker.engine.prompts
    assert text_read(speaker, prompt_TD) == ([1] if speaker.model.config.language.family == "t5" else [2])
    assert (answer.tokens, answer.finish_reason, answer.score) == ([67], "eos", 0.0)
    assert answer.text == speaker.tokenizer.decode([67])
    assert speaker.engine.options == [CAPTION]


def test_questions_get_their_template(speaker):
    ask(speaker, images(1), ["how many dogs?"])
    family = speaker.model.config.language.family
    words = "Question: how many dogs? Short answer:" if family == "t5" else "Question: how many dogs? Answer:"
    ids = speaker.tokenizer.prompt_ids(words, speaker.model.config.language)
    assert text_read(speaker, speaker.engine.prompts[0]) == ids
    assert speaker.engine.options == [ASK]


def test_the_papers_settings():
    assert (CAPTION.num_beams, CAPTION.max_new_tokens, CAPTION.length_penalty) == (5, 30, 1.0)
    assert (ASK.num_beams, ASK.max_new_tokens, ASK.length_penalty) == (5, 10, -1.0)
    assert (CHAT.num_beams, CHAT.max_new_tokens) == (1, 40)


@pytest.mark.parametrize(
    ("num_images", "num_texts", "expected"),
    [
        (3, 3, [(0, "a"), (1, "b"), (2, "c")]),
        (1, 3, [(0, "a"), (0, "b"), (0, "c")]),
        (3, 1, [(0, "a"), (1, "a"), (2, "a")]),
        (1, 1, [(0, "a")]),
        (0, 1, []),
        (1, 0, []),
        (0, 0, []),
    ],
)
def test_pairs(num_images, num_texts, expected):
    assert pairs(range(num_images), "abc"[:num_texts]) == expected
    assert num_pairs(num_images, num_texts) == len(expected)


@pytest.mark.parametrize(("num_images", "num_texts"), [(2, 3), (3, 2), (0, 2), (2, 0)])
def test_numbers_that_do_not_pair_up(num_images, num_texts):
    with pytest.raises(OptionError, match=f"{num_images} images and {num_texts} texts"):
        num_pairs(num_images, num_texts)


def test_batches_are_bounded_and_in_order(speaker):
    answers = caption(speaker, images(37))
    assert speaker.engine.batches == [BATCH_SIZE, BATCH_SIZE, 5]
    assert len(answers) == 37
    expected = [speaker.model.prompt(image.queries_QD) for image in images(37)]
    assert all(row[:4].equal(prompt_QD) for row, prompt_QD in zip(speaker.engine.prompts, expected, strict=True))
    with pytest.raises(OptionError, match="batch_size is 0"):
        caption(speaker, images(1), batch_size=0)


def test_an_image_of_another_model(speaker):
    with pytest.raises(OptionError, match=r"\[4, 32\].*another model.*\[4, 16\].*encode the image again"):
        caption(speaker, [EncodedImage(torch.zeros(4, 32))])
    caption(speaker, [EncodedImage(torch.zeros(4, 16), speaker.identity)])
    with pytest.raises(OptionError, match="another model"):  # of the same shape
        caption(speaker, [EncodedImage(torch.zeros(4, 16), "0123456789abcdef")])


def test_what_does_not_fit():
    speaker = Speaker(tiny.generative("opt"), Tokenizer(tiny.opt_tokenizer()), Recorder())
    [image] = images(1)
    room = 128 - 4 - 10  # positions, image, new tokens
    fitting = "x" * (room - 1)
    assert len(speaker.prompt(image, fitting, 10)) == 128 - 10
    assert speaker.fits(fitting, 10)
    assert not speaker.fits(fitting + "x", 10)
    with pytest.raises(OptionError, match=f"has {room + 1} tokens; beside 4 .* and 10 .*has {room} left; shorten it"):
        speaker.prompt(image, fitting + "x", 10)
    engine = Engine(speaker.model.language, eos_token_ids=[speaker.model.config.language.eos_token_id])
    [[answer]] = engine.generate([speaker.prompt(image, fitting, 10)], GenerateOptions(max_new_tokens=10))
    assert len(answer.tokens) <= 10


# ---- choices ------------------------------------------------------------------------------------------


def test_ranking(speaker):
    config = speaker.model.config.language
    [first, second] = rank(speaker, images(2), ["is it?"], ["yes", " no ", "on the  left"], batch_size=4)
    assert first == second
    assert speaker.engine.batches == [4, 2]
    scores = {text: -float(sum(speaker.tokenizer.answer_ids(text, config))) for text in ("yes", "no", "on the left")}
    assert [choice.text for choice in first] == sorted(scores, key=scores.get, reverse=True)
    assert [choice.score for choice in first] == sorted(scores.values(), reverse=True)
    assert sum(choice.probability for choice in first) == pytest.approx(1)
    assert first[0].probability >= first[-1].probability


@torch.no_grad()
def test_probabilities_are_those_of_the_model():
    """Two choices that differ in one token: their ratio is that of the two next-token probabilities."""
    model, tokenizer = tiny.generative("opt"), Tokenizer(tiny.opt_tokenizer())
    speaker = Speaker(model, tokenizer, Engine(model.language, eos_token_ids=[model.config.language.eos_token_id]))
    [image] = images(1)
    [[best, other]] = rank(speaker, [image], ["is it?"], ["yes", "no"])
    prompt_TD = speaker.prompt(image, "Question: is it? Answer:", 4)
    totals = {}
    for text in ("yes", "no"):
        ids = tokenizer.answer_ids(text, model.config.language)
        embedded_TD = model.language.embed(torch.tensor(ids[:-1]))
        logits_TV = model.language.logits(model.language(torch.cat([prompt_TD, embedded_TD])[None]))[0]
        log_probs_TV = logits_TV[len(prompt_TD) - 1 :].log_softmax(-1)
        totals[text] = float(log_probs_TV[range(len(ids)), ids].sum())
    assert best.score == pytest.approx(totals[best.text], abs=1e-4)
    odds = torch.tensor([totals[best.text], totals[other.text]]).softmax(0)
    assert best.probability == pytest.approx(float(odds[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ("yes", "'yes'; give a list"),
        ([], "no choices"),
        (["yes"], "at least two"),
        (["yes", " "], "empty"),
        (["yes", "yes "], "'yes' occurs more than once"),
    ],
)
def test_choices_that_are_none(choices, words):
    with pytest.raises(OptionError, match=words):
        check_choices(choices)


# ---- options ------------------------------------------------------------------------------------------


def test_merged():
    assert merged(ASK, {}) == ASK
    assert merged(ASK, {"num_beams": 2}).length_penalty == -1.0
    sampling = merged(ASK, {"sample": True, "temperature": 0.5})
    assert (sampling.num_beams, sampling.length_penalty, sampling.temperature) == (1, 1.0, 0.5)
    assert merged(CAPTION, {"num_return": 8}).num_beams == 8
    assert merged(CAPTION, {"num_return": 3}).num_beams == 5
    assert merged(CAPTION, {"num_return": 8, "sample": True}).num_beams == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_beam": 3}, "no option num_beam; did you mean num_beams"),
        ({"colour": 3}, "the options are max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"sample": True, "num_beams": 3}, "sample needs num_beams=1"),
        ({"num_beams": 1, "num_return": 3}, "num_return is 3"),
        ({"num_return": "3"}, "num_return is '3'"),
    ],
)
def test_options_that_are_none(given, words):
    with pytest.raises(OptionError, match=words):
        merged(CAPTION, given)
