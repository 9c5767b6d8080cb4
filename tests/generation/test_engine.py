"""The loop, the strategies and the endings, over a table in place of a language model."""

import itertools
import math

import pytest
import torch

from blip2.errors import OptionError
from blip2.generation import Engine, GenerateOptions

EOS = 0


def letters(tokens):
    """1 -> a, 2 -> b, ...: a text for stop strings."""
    return "".join(chr(96 + token) for token in tokens)


def chain(table_language, *tokens):
    """A table by which each token is followed by the next of these, nearly always."""
    language = table_language(max(tokens) + 1, scale=0.0)
    for last, following in itertools.pairwise(tokens):
        language.table_VVV[:, last, following] = 20.0
    return language


def every_text(language, prompt, vocabulary, max_new_tokens):
    """Each text that can be written, with its log-probability."""
    ends = []
    for length in range(1, max_new_tokens + 1):
        for body in itertools.product(range(1, vocabulary), repeat=length - 1):
            lasts = range(vocabulary) if length == max_new_tokens else [EOS]
            ends += [[*body, last] for last in lasts]
    return [(tokens, language.log_prob(prompt, tokens)) for tokens in ends]


# --- Beam search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
def test_enough_beams_find_the_best_texts(table_language, length_penalty, seed):
    language = table_language(4, seed)
    prompt = language.prompt(1 + seed % 3)
    ranked = sorted(
        ((score / len(tokens) ** length_penalty, tokens) for tokens, score in every_text(language, prompt, 4, 4)),
        reverse=True,
    )
    options = GenerateOptions(
        max_new_tokens=4, num_beams=90, num_return=5, length_penalty=length_penalty, early_stopping="never"
    )
    (found,) = Engine(language, eos_token_ids=[EOS]).generate([prompt], options)
    assert [answer.tokens for answer in found] == [
        tokens[:-1] if tokens[-1] == EOS else tokens for _, tokens in ranked[:5]
    ]
    assert [answer.score for answer in found] == pytest.approx([score for score, _ in ranked[:5]], abs=1e-5)


def test_two_beams_see_past_a_tempting_first_token(table_language):
    language = table_language(4, scale=0.0)
    table = language.table_VVV
    table[0, 1] = torch.tensor([-9.0, -9.0, 0.0, -0.2])  # 2 is a little likelier than 3 ...
    table[1, 2] = torch.tensor([0.0, 0.0, 0.0, 0.0])  # ... but leads nowhere in particular,
    table[1, 3] = torch.tensor([9.0, 0.0, 0.0, 0.0])  # while 3 ends for certain
    engine = Engine(language, eos_token_ids=[EOS])
    prompts = [language.prompt(1)]
    (greedy,), (beams,) = (
        engine.generate(prompts, GenerateOptions(max_new_tokens=2, num_beams=beams, length_penalty=0.0))
        for beams in (1, 2)
    )
    assert greedy[0].tokens[0] == 2
    assert beams[0].tokens == [3] and beams[0].score > greedy[0].score


def test_one_beam_more_than_there_are_texts(table_language):
    language = table_language(3)
    options = GenerateOptions(max_new_tokens=1, num_beams=5, num_return=5)
    (answers,) = Engine(language, eos_token_ids=[EOS]).generate([language.prompt(1)], options)
    assert sorted(answer.tokens for answer in answers) == [[], [1], [2]]


def test_early_stopping_settles_for_less(table_language):
    language = table_language(6, seed=1, scale=1.0)
    prompts = [language.prompt(token) for token in (1, 2, 3, 4, 5)]
    engine = Engine(language, eos_token_ids=[EOS])
    best = {}
    for early in (True, False, "never"):
        options = GenerateOptions(max_new_tokens=15, num_beams=3, length_penalty=1.0, early_stopping=early)
        best[early] = [answers[0].score for answers in engine.generate(prompts, options)]
    assert all(a <= b <= c for a, b, c in zip(best[True], best[False], best["never"], strict=True))
    assert best[True] != best["never"]


def test_the_length_penalty_chooses_the_length(table_language):
    language = table_language(6, seed=2, scale=1.0)
    engine = Engine(language, eos_token_ids=[EOS])
    lengths = []
    for penalty in (-2.0, 0.0, 3.0):
        options = GenerateOptions(max_new_tokens=10, num_beams=4, length_penalty=penalty, early_stopping="never")
        lengths.append(len(engine.generate([language.prompt(1)], options)[0][0].tokens))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


# --- Sampling ----------------------------------------------------------------------------------------------------


def test_samples_come_as_often_as_they_are_likely(table_language):
    language = table_language(5, scale=1.0)
    options = GenerateOptions(max_new_tokens=1, sample=True, seed=0, num_return=20_000, temperature=1.5)
    (answers,) = Engine(language, eos_token_ids=[EOS]).generate([language.prompt(2)], options)
    drawn = torch.tensor([answer.tokens[0] if answer.tokens else EOS for answer in answers])
    share = torch.bincount(drawn, minlength=5) / len(answers)
    torch.testing.assert_close(share, (language.table_VVV[0, 2] / 1.5).softmax(-1), atol=0.01, rtol=0)


def test_what_is_ruled_out_is_never_drawn(table_language):
    language = table_language(5, scale=0.1)
    options = GenerateOptions(max_new_tokens=1, sample=True, seed=0, num_return=2_000, top_k=2)
    (answers,) = Engine(language, eos_token_ids=[EOS]).generate([language.prompt(2)], options)
    likeliest = set(language.table_VVV[0, 2].topk(2).indices.tolist())
    assert {answer.tokens[0] if answer.tokens else EOS for answer in answers} == likeliest


def test_seeds(table_language):
    language = table_language(30, scale=0.5)
    engine = Engine(language, eos_token_ids=[EOS])
    prompts = [language.prompt(1), language.prompt(2), language.prompt(1)]

    def texts(**options):
        answers = engine.generate(prompts, GenerateOptions(sample=True, max_new_tokens=8, **options))
        return [[answer.tokens for answer in each] for each in answers]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts(seed=1)[0] == texts(seed=1)[2] != texts(seed=1)[1]
    several = texts(seed=1, num_return=3)
    assert texts(seed=1)[0][0] in several[0], "one sample is the first of several"
    assert len({tuple(text) for text in several[0]}) == 3
    assert texts() != texts()
    torch.manual_seed(0)
    first = texts()
    torch.manual_seed(0)
    assert texts() == first and first[0] != first[2]


def test_a_longer_limit_only_adds(table_language):
    language = table_language(30, scale=0.5)
    engine = Engine(language, eos_token_ids=[])
    short, long = (
        engine.generate([language.prompt(1)], GenerateOptions(sample=True, seed=0, max_new_tokens=limit))[0][0].tokens
        for limit in (5, 50)
    )
    assert long[:5] == short and len(long) == 50


# --- Endings -----------------------------------------------------------------------------------------------------

ALL_WAYS = {"beams": {"num_beams": 3}, "greedy": {}, "sampling": {"sample": True, "seed": 0}}


@pytest.mark.parametrize("way", ALL_WAYS)
def test_lengths_count_new_tokens(table_language, way):
    language = table_language(8, seed=3, scale=0.5)
    language.table_VVV[..., EOS] = 3.0  # an end is always likely
    engine = Engine(language, eos_token_ids=[EOS])
    prompts = [language.prompt(*range(1, 1 + length)) for length in (1, 4, 6)]
    for shortest, longest in ((0, 1), (3, 3), (4, 9)):
        options = GenerateOptions(min_new_tokens=shortest, max_new_tokens=longest, **ALL_WAYS[way])
        for (answer,) in engine.generate(prompts, options):
            assert shortest <= len(answer.tokens) <= longest
            assert answer.finish_reason == ("length" if len(answer.tokens) == longest else "eos")
            assert EOS not in answer.tokens


@pytest.mark.parametrize("way", ALL_WAYS)
def test_several_end_tokens_and_suppressed_ones(table_language, way):
    language = chain(table_language, 1, 2, 3, 4, 5)
    for ends, suppressed, expected in (([4], [], [2, 3]), ([0, 3], [], [2]), ([5], [], [2, 3, 4])):
        engine = Engine(language, eos_token_ids=ends, suppress_token_ids=suppressed)
        (answers,) = engine.generate([language.prompt(1)], GenerateOptions(**ALL_WAYS[way]))
        assert answers[0].tokens == expected and answers[0].finish_reason == "eos"
    engine = Engine(language, eos_token_ids=[5], suppress_token_ids=[3, 1])
    (answers,) = engine.generate([language.prompt(1)], GenerateOptions(max_new_tokens=20, **ALL_WAYS[way]))
    assert 3 not in answers[0].tokens and 1 not in answers[0].tokens


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("de",), "bc"), (("c", "de"), "b"), (("zz", "f"), "bcde"), (("b",), ""), (("gh",), "bcdef")],
)
def test_stop_strings(table_language, way, stop, expected):
    language = chain(table_language, 1, 2, 3, 4, 5, 6, EOS)
    engine = Engine(language, eos_token_ids=[EOS], decode=letters)
    (answers,) = engine.generate([language.prompt(1)], GenerateOptions(stop=stop, **ALL_WAYS[way]))
    assert letters(answers[0].tokens) == expected
    assert answers[0].finish_reason == ("eos" if expected == "bcdef" else "stop")


def test_a_stop_string_inside_a_token(table_language):
    words = {2: "red", 3: " car.\nQ", 4: "uestion"}
    language = chain(table_language, 1, 2, 3, 4, EOS)
    engine = Engine(
        language, eos_token_ids=[EOS], decode=lambda tokens: "".join(words.get(token, "") for token in tokens)
    )
    (answers,) = engine.generate([language.prompt(1)], GenerateOptions(stop=("\nQ",)))
    assert answers[0].tokens == [2], "a token that goes past the stop is left out whole"


def test_tokens_are_reported_as_soon_as_they_are_sure(table_language):
    language = chain(table_language, 1, 2, 3, 4, 5, 6, EOS)
    engine = Engine(language, eos_token_ids=[EOS], decode=letters)
    prompts = [language.prompt(1), language.prompt(4)]
    seen = []
    answers = engine.generate(prompts, on_token=lambda *event: seen.append(event))
    assert seen == [(0, 2), (1, 5), (0, 3), (1, 6), (0, 4), (0, 5), (0, 6)]
    assert [answer[0].tokens for answer in answers] == [[2, 3, 4, 5, 6], [5, 6]]

    for stop, expected in ((("cde",), [2]), (("cdf",), [2, 3, 4, 5, 6]), (("fg",), [2, 3, 4, 5, 6])):
        seen.clear()
        (answer,) = engine.generate(prompts[:1], GenerateOptions(stop=stop), on_token=lambda *e: seen.append(e))
        assert [token for _, token in seen] == answer[0].tokens == expected


def test_rows_that_are_over_leave_the_batch(table_language):
    language = chain(table_language, 1, 2, 3, 4, 5, 6, EOS)
    engine = Engine(language, eos_token_ids=[EOS])
    prompts = [language.prompt(token) for token in (6, 1, 5, 3)]
    assert [len(answers[0].tokens) for answers in engine.generate(prompts)] == [0, 5, 1, 3]
    assert language.rows_of_calls == [4, 3, 2, 2, 1, 1]


def test_a_prompt_is_read_once(table_language):
    language = table_language(6)
    engine = Engine(language, eos_token_ids=[])
    prompts = [language.prompt(1), language.prompt(2)]
    engine.generate(prompts, GenerateOptions(num_beams=5, max_new_tokens=3))
    engine.generate(prompts, GenerateOptions(sample=True, num_return=4, max_new_tokens=3))
    assert language.rows_of_calls == [2, 10, 10, 2, 8, 8]


# --- Scores and refusals -----------------------------------------------------------------------------------------


def test_score(table_language):
    language = table_language(6)
    engine = Engine(language, eos_token_ids=[EOS])
    prompts = [language.prompt(1), language.prompt(2), language.prompt(1, 3), language.prompt(1)]
    answers = [[3, 2, EOS], [], [5], [3, 2]]
    expected = [language.log_prob(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert engine.score(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert engine.score([], []) == []
    assert engine.score(prompts[:1], [[]]) == [0.0]
    with pytest.raises(ValueError, match="4 prompts, but 1 answers"):
        engine.score(prompts, [[1]])


def test_nothing_asked(table_language):
    assert Engine(table_language(3), eos_token_ids=[EOS]).generate([], GenerateOptions(num_beams=2)) == []


def test_refusals(table_language):
    language = table_language(3)
    engine = Engine(language, eos_token_ids=[EOS])
    prompts = [language.prompt(1)]
    with pytest.raises(OptionError, match="decode"):
        engine.generate(prompts, GenerateOptions(stop=("a",)))
    for options in ({"num_beams": 2}, {"sample": True, "num_return": 2}):
        with pytest.raises(OptionError, match="on_token"):
            engine.generate(prompts, GenerateOptions(**options), on_token=print)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([*prompts, torch.empty(0, 1)])


def test_half_precision_scores_are_summed_in_full(table_language):
    language = table_language(6)
    language.table_VVV = language.table_VVV.bfloat16()
    engine = Engine(language, eos_token_ids=[])
    for options in ({}, {"num_beams": 3, "length_penalty": 0.0}, {"sample": True, "seed": 1, "top_p": 0.9}):
        ((answer,),) = engine.generate([language.prompt(1)], GenerateOptions(max_new_tokens=40, **options))
        language_32 = type(language)(language.table_VVV.float())
        assert math.isclose(answer.score, language_32.log_prob(language.prompt(1), answer.tokens), abs_tol=1e-3)
