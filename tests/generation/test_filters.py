"""Each filter by a case small enough to check by eye; against the reference in tests/parity."""

import pytest
import torch

from blip2.generation import GenerateOptions, filters
from blip2.generation.filters import apply_filters, build_filters

OUT = float("-inf")
NONE_YET = torch.empty(1, 0, dtype=torch.long)


def row(*values):
    return torch.tensor([values])


def test_repetition_penalty():
    scores = row(2.0, -2.0, 4.0, 1.0)
    out = filters.repetition_penalty(row(1, 2, 1), scores, penalty=2.0)
    assert out.tolist() == [[2.0, -4.0, 2.0, 1.0]], "once, however often the token came"
    assert scores.tolist() == [[2.0, -2.0, 4.0, 1.0]], "what was given stays"
    assert filters.repetition_penalty(NONE_YET, scores, penalty=2.0).tolist() == scores.tolist()


@pytest.mark.parametrize(
    ("size", "tokens", "ruled_out"),
    [
        (2, (1, 2, 1), {2}),
        (2, (1, 2, 1, 3, 1), {2, 3}),
        (2, (1, 1), {1}),
        (2, (1, 2), set()),
        (3, (1, 2, 3, 1, 2), {3}),
        (3, (1, 2), set()),
        (1, (1, 3), {1, 3}),
        (2, (3, 2, 1, 2, 3), {2}),  # 2 also ends a run that has not begun
    ],
)
def test_no_repeat_ngram(size, tokens, ruled_out):
    out = filters.no_repeat_ngram(row(*tokens), torch.zeros(1, 5), size=size)
    assert {token for token in range(5) if out[0, token] == OUT} == ruled_out


def test_min_length():
    for tokens, ends in ((NONE_YET, [OUT, OUT]), (row(2), [OUT, OUT]), (row(2, 2), [1.0, 2.0])):
        eos = torch.tensor([0, 1])
        out = filters.min_length(tokens, row(1.0, 2.0, 3.0), min_new_tokens=2, eos_token_ids=eos)
        assert out.tolist() == [[*ends, 3.0]]


def test_suppress():
    out = filters.suppress(NONE_YET, torch.ones(2, 3), token_ids=torch.tensor([0, 2]))
    assert out.tolist() == [[OUT, 1.0, OUT]] * 2


def test_temperature():
    assert filters.temperature(NONE_YET, row(1.0, -2.0), temperature=0.5).tolist() == [[2.0, -4.0]]


def test_top_k():
    scores = row(1.0, 3.0, 2.0)
    assert filters.top_k(NONE_YET, scores, k=1).tolist() == [[OUT, 3.0, OUT]]
    assert filters.top_k(NONE_YET, scores, k=2).tolist() == [[OUT, 3.0, 2.0]]
    assert filters.top_k(NONE_YET, scores, k=9).tolist() == scores.tolist()


def test_top_p():
    scores = torch.tensor([[0.1, 0.6, 0.3]]).log()
    for p, kept in ((0.05, [1]), (0.59, [1]), (0.61, [1, 2]), (0.89, [1, 2]), (0.95, [0, 1, 2])):
        out = filters.top_p(NONE_YET, scores, p=p)
        assert [token for token in range(3) if out[0, token] != OUT] == kept


def test_min_p():
    scores = torch.tensor([[0.1, 0.6, 0.3]]).log()
    for p, kept in ((0, [0, 1, 2]), (0.16, [0, 1, 2]), (0.17, [1, 2]), (0.51, [1]), (1, [1])):
        out = filters.min_p(NONE_YET, scores, p=p)
        assert [token for token in range(3) if out[0, token] != OUT] == kept


def test_typical_p():
    """The entropy is 0.90: the token of surprise 1.20 is nearest, then that of 0.51, and last that of 2.30."""
    scores = torch.tensor([[0.1, 0.6, 0.3]]).log()
    for p, kept in ((0.1, [2]), (0.4, [1, 2]), (0.95, [0, 1, 2])):
        out = filters.typical_p(NONE_YET, scores, p=p)
        assert [token for token in range(3) if out[0, token] != OUT] == kept


def test_only_what_is_asked_for_is_built_and_in_order():
    def names(options, suppressed=()):
        built = build_filters(options, eos_token_ids=[0], suppress_token_ids=suppressed, device=torch.device("cpu"))
        return [each.func.__name__ for each in built]

    assert names(GenerateOptions()) == []
    options = GenerateOptions(
        sample=True, temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=2.0, no_repeat_ngram_size=2,
        min_new_tokens=1, min_p=0.1, typical_p=0.9,
    )  # fmt: skip
    assert names(options, [3]) == [
        "repetition_penalty", "no_repeat_ngram", "min_length", "suppress", "temperature", "top_k", "top_p",
        "min_p", "typical_p",
    ]  # fmt: skip


def test_one_after_the_other():
    options = GenerateOptions(sample=True, top_k=2, top_p=0.6)
    built = build_filters(options, eos_token_ids=[0], suppress_token_ids=[0], device=torch.device("cpu"))
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    out = apply_filters(built, NONE_YET, scores)
    # Without token 0 the two best are 1 and 2, of which 1 has exactly 3/5.
    assert [token for token in range(4) if out[0, token] != OUT] in ([1], [1, 2])
    assert out[0, 0] == OUT and out[0, 3] == OUT
