"""Each filter gives what the reference's logits processor of the same name gives."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from blip2.generation import filters

process = pytest.importorskip("transformers.generation.logits_process")

R, T, V = 6, 9, 30
PAIRS = {
    "repetition penalty": (
        lambda tokens, scores: filters.repetition_penalty(tokens, scores, penalty=1.4),
        lambda: process.RepetitionPenaltyLogitsProcessor(1.4),
    ),
    **{
        f"no repeated {size}-gram": (
            lambda tokens, scores, size=size: filters.no_repeat_ngram(tokens, scores, size=size),
            lambda size=size: process.NoRepeatNGramLogitsProcessor(size),
        )
        for size in (1, 2, 3)
    },
    "suppressed tokens": (
        lambda tokens, scores: filters.suppress(tokens, scores, token_ids=torch.tensor([3, 29])),
        lambda: process.SuppressTokensLogitsProcessor([3, 29]),
    ),
    "temperature": (
        lambda tokens, scores: filters.temperature(tokens, scores, temperature=0.7),
        lambda: process.TemperatureLogitsWarper(0.7),
    ),
    **{
        f"top {k}": (
            lambda tokens, scores, k=k: filters.top_k(tokens, scores, k=k),
            lambda k=k: process.TopKLogitsWarper(k),
        )
        for k in (1, 7, 99)
    },
    **{
        f"top {p:.0%}": (
            lambda tokens, scores, p=p: filters.top_p(tokens, scores, p=p),
            lambda p=p: process.TopPLogitsWarper(p),
        )
        for p in (0.01, 0.5, 0.95)
    },
    **{
        f"{name} {value:g}, at least {least}": (
            lambda tokens, scores, ours=ours, key=key, value=value, least=least: ours(
                tokens, scores, **{key: value}, least=least
            ),
            lambda theirs=theirs, value=value, least=least: theirs(value, min_tokens_to_keep=least),
        )
        for name, ours, key, theirs, values in (
            ("top p", filters.top_p, "p", process.TopPLogitsWarper, (0.01,)),
            ("min p", filters.min_p, "p", process.MinPLogitsWarper, (0.001, 0.2, 1.0)),
            ("typical p", filters.typical_p, "p", process.TypicalLogitsWarper, (0.01, 0.5, 0.95)),
            ("epsilon", filters.epsilon_cutoff, "epsilon", process.EpsilonLogitsWarper, (0.001, 0.1, 0.9)),
            ("eta", filters.eta_cutoff, "epsilon", process.EtaLogitsWarper, (0.001, 0.1, 0.9)),
        )
        for value in values
        for least in (1, 3)
    },
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("length", [0, 1, T])
def test_filter(name, length):
    ours, theirs = PAIRS[name]
    generator = torch.Generator().manual_seed(length)
    # Few different tokens, so that they repeat.
    tokens_RT = torch.randint(0, 4, (R, length), generator=generator)
    scores_RV = torch.randn(R, V, generator=generator) * 3
    assert_close(ours(tokens_RT, scores_RV), theirs()(tokens_RT, scores_RV.clone()))


@pytest.mark.parametrize("length", [0, 3, 4, 5])
def test_min_length(length):
    tokens_RT, scores_RV = torch.ones(R, length, dtype=torch.long), torch.randn(R, V)
    ours = filters.min_length(tokens_RT, scores_RV, min_new_tokens=4, eos_token_ids=torch.tensor([2, 8]))
    theirs = process.MinNewTokensLengthLogitsProcessor(0, 4, [2, 8])
    assert_close(ours, theirs(tokens_RT, scores_RV.clone()))
