"""Filters of the next token's scores before one is chosen.

A filter takes the new tokens so far ``int[R, T]`` (without the prompt) and scores ``float[R, V]`` (logits, or
log-probabilities in beam search), and returns scores of the same shape. A token that is ruled out gets -inf.

R rows, T new tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from blip2.generation.options import GenerateOptions

Filter = Callable[[Tensor, Tensor], Tensor]
RULED_OUT = float("-inf")


def repetition_penalty(tokens_RT: Tensor, scores_RV: Tensor, *, penalty: float) -> Tensor:
    """For tokens that occurred before, divide positive scores by the penalty and multiply negative ones."""
    seen_RT = scores_RV.gather(1, tokens_RT)
    return scores_RV.scatter(1, tokens_RT, torch.where(seen_RT < 0, seen_RT * penalty, seen_RT / penalty))


def no_repeat_ngram(tokens_RT: Tensor, scores_RV: Tensor, *, size: int) -> Tensor:
    """Rule out each token that would repeat an n-gram of ``size`` tokens."""
    length = tokens_RT.shape[1]
    if length < size:
        return scores_RV
    runs_RWN = tokens_RT.unfold(1, size, 1)
    last_R1N = tokens_RT[:, None, length - size + 1 :]
    is_begun_RW = (runs_RWN[..., :-1] == last_R1N).all(-1)
    # A sum, since the same token may end both an n-gram that occurred and one that did not.
    count_RV = torch.zeros_like(scores_RV).scatter_add(1, runs_RWN[..., -1], is_begun_RW.to(scores_RV.dtype))
    return scores_RV.masked_fill(count_RV > 0, RULED_OUT)


def min_length(tokens_RT: Tensor, scores_RV: Tensor, *, min_new_tokens: int, eos_token_ids: Tensor) -> Tensor:
    """No end token among the first ``min_new_tokens``."""
    return suppress(tokens_RT, scores_RV, token_ids=eos_token_ids) if tokens_RT.shape[1] < min_new_tokens else scores_RV


def suppress(tokens_RT: Tensor, scores_RV: Tensor, *, token_ids: Tensor) -> Tensor:
    """Rule out tokens that are never generated: the image token, vocabulary rows without text."""
    return scores_RV.index_fill(1, token_ids, RULED_OUT)


def temperature(tokens_RT: Tensor, scores_RV: Tensor, *, temperature: float) -> Tensor:
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return scores_RV / temperature


def top_k(tokens_RT: Tensor, scores_RV: Tensor, *, k: int) -> Tensor:
    """Rule out all but the ``k`` best (and ties with the last of them)."""
    kth_R1 = scores_RV.topk(min(k, scores_RV.shape[1])).values[:, -1:]
    return scores_RV.masked_fill(scores_RV < kth_R1, RULED_OUT)


def top_p(tokens_RT: Tensor, scores_RV: Tensor, *, p: float, least: int = 1) -> Tensor:
    """Keep the most likely tokens until their probability reaches ``p``, and at least the ``least`` first."""
    ordered_RV, order_RV = scores_RV.sort(descending=True, dim=-1)
    probability_RV = ordered_RV.softmax(-1)
    before_RV = probability_RV.cumsum(-1) - probability_RV
    is_out_RV = before_RV >= p
    is_out_RV[:, :least] = False
    return scores_RV.masked_fill(is_out_RV.scatter(1, order_RV, is_out_RV), RULED_OUT)


def min_p(tokens_RT: Tensor, scores_RV: Tensor, *, p: float, least: int = 1) -> Tensor:
    """Rule out tokens less likely than ``p`` times the most likely one; the ``least`` best stay."""
    probability_RV = scores_RV.softmax(-1)
    is_out_RV = probability_RV < p * probability_RV.amax(-1, keepdim=True)
    return _all_but_the_best(scores_RV, is_out_RV, least)


def typical_p(tokens_RT: Tensor, scores_RV: Tensor, *, p: float, least: int = 1) -> Tensor:
    """Keep the tokens whose surprise is closest to its expectation, until their probability reaches ``p``."""
    log_probs_RV = scores_RV.log_softmax(-1)
    probability_RV = log_probs_RV.exp()
    entropy_R1 = -(log_probs_RV * probability_RV).nansum(-1, keepdim=True)
    distance_RV, order_RV = (-log_probs_RV - entropy_R1).abs().sort(dim=-1)
    summed_RV = probability_RV.gather(1, order_RV).cumsum(-1)
    last_R1 = (summed_RV < p).sum(-1, keepdim=True).clamp(max=scores_RV.shape[1] - 1)
    is_out_RV = distance_RV > distance_RV.gather(1, last_R1)
    is_out_RV[:, :least] = False
    return scores_RV.masked_fill(is_out_RV.scatter(1, order_RV, is_out_RV), RULED_OUT)


def epsilon_cutoff(tokens_RT: Tensor, scores_RV: Tensor, *, epsilon: float, least: int = 1) -> Tensor:
    """Rule out tokens less likely than ``epsilon``; the ``least`` best stay."""
    return _all_but_the_best(scores_RV, scores_RV.softmax(-1) < epsilon, least)


def eta_cutoff(tokens_RT: Tensor, scores_RV: Tensor, *, epsilon: float, least: int = 1) -> Tensor:
    """As `epsilon_cutoff`, with a lower threshold for flat distributions. (Hewitt et al., 2022)"""
    probability_RV = scores_RV.softmax(-1)
    entropy_R1 = -torch.xlogy(probability_RV, probability_RV).sum(-1, keepdim=True)
    bound_R1 = (epsilon**0.5 * (-entropy_R1).exp()).clamp(max=epsilon)
    return _all_but_the_best(scores_RV, probability_RV < bound_R1, least)


def _all_but_the_best(scores_RV: Tensor, is_out_RV: Tensor, least: int) -> Tensor:
    """Rule tokens out, except the ``least`` best."""
    best_RN = scores_RV.topk(min(least, scores_RV.shape[1])).indices
    return scores_RV.masked_fill(is_out_RV.scatter(1, best_RN, False), RULED_OUT)


def build_filters(
    options: GenerateOptions, *, eos_token_ids: Sequence[int], suppress_token_ids: Sequence[int], device: torch.device
) -> list[Filter]:
    """The filters for the options, in Hugging Face's order (it matters: top-p follows top-k)."""
    filters: list[Filter] = []
    if options.repetition_penalty != 1:
        filters.append(partial(repetition_penalty, penalty=options.repetition_penalty))
    if options.no_repeat_ngram_size:
        filters.append(partial(no_repeat_ngram, size=options.no_repeat_ngram_size))
    if options.min_new_tokens:
        eos = torch.tensor(eos_token_ids, dtype=torch.long, device=device)
        filters.append(partial(min_length, min_new_tokens=options.min_new_tokens, eos_token_ids=eos))
    if suppress_token_ids:
        ids = torch.tensor(suppress_token_ids, dtype=torch.long, device=device)
        filters.append(partial(suppress, token_ids=ids))
    if options.sample and options.temperature != 1:
        filters.append(partial(temperature, temperature=options.temperature))
    if options.sample and options.top_k:
        filters.append(partial(top_k, k=options.top_k))
    if options.sample and options.top_p < 1:
        filters.append(partial(top_p, p=options.top_p))
    if options.sample and options.min_p:
        filters.append(partial(min_p, p=options.min_p))
    if options.sample and options.typical_p < 1:
        filters.append(partial(typical_p, p=options.typical_p))
    return filters


def apply_filters(filters: Sequence[Filter], tokens_RT: Tensor, scores_RV: Tensor) -> Tensor:
    """Apply the filters in order; the given scores are not changed."""
    for each in filters:
        scores_RV = each(tokens_RT, scores_RV)
    return scores_RV
