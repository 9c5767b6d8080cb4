"""Filters and stopping criteria for the options of Hugging Face's ``generate``.

Filters and criteria have the name of the reference's class, since an instance of that class given by a program replaces
ours. Filters get the prompt's ids before the new ones: for an OPT including the image's, for a T5 the start token.

R rows, T ids so far, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip2.compat.lockstep import Criterion, Scores
from blip2.errors import OptionError
from blip2.generation import filters
from blip2.generation.filters import RULED_OUT, Filter


class Prompted(NamedTuple):
    """What filters need to know of the prompts and of the end tokens."""

    length: int
    """The prompts' ids, with padding."""
    skipped_R1: Tensor
    """Number of padding ids before the first real one, ``int[R, 1]``."""
    eos_token_ids: Tensor
    """The end tokens that exist, out of ``num_ends``."""
    num_ends: int
    vocab_size: int
    max_new_tokens: int
    min_new_tokens: int
    num_beams: int


def build_filters(asked: Mapping[str, Any], prompted: Prompted, custom: Sequence[Any]) -> list[Filter]:
    """The filters of the options in the reference's order, followed by the program's own."""
    built = [*_own_last(list(_processors(asked, prompted)), custom), *_warpers(asked, prompted)]
    if asked.get("renormalize_logits"):
        built.append(lambda ids_RT, scores_RV: scores_RV.log_softmax(-1))
    return built


def build_criteria(
    asked: Mapping[str, Any], prompted: Prompted, tokenizer: Any, custom: Sequence[Any]
) -> list[Criterion]:
    """Criteria that end a row: length, time, stop strings, end tokens, and the program's own."""
    longest = prompted.length + prompted.max_new_tokens
    named: list[tuple[str, Criterion]] = [("MaxLengthCriteria", partial(_is_long, longest=longest))]
    if (seconds := asked.get("max_time")) is not None:
        named.append(("MaxTimeCriteria", partial(_is_late, deadline_s=time.monotonic() + seconds)))
    if stop := asked.get("stop_strings"):
        if tokenizer is None:
            raise OptionError(
                "stop_strings need a tokenizer to decode the text; give tokenizer=processor.tokenizer"
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        named.append(("StopStringCriteria", partial(_says, stops=stops, tokenizer=tokenizer)))
    named.append(("EosTokenCriteria", lambda ids_RT, scores: torch.isin(ids_RT[:, -1], prompted.eos_token_ids)))
    return _own_last(named, custom)


def own(name: str, given: Any) -> list[Any]:
    """The processors or criteria of a program: a list of callables, or one alone."""
    given = [] if given is None else [given] if callable(given) and not isinstance(given, list) else list(given)
    for each in given:
        if not callable(each):
            raise OptionError(f"{name} holds {each!r}; each has to be callable with input_ids and scores")
    return given


def longest_of(criteria: Sequence[Any]) -> int | None:
    """The maximum length in a program's own criterion: ids of the prompt and new ones."""
    return next((each.max_length for each in criteria if type(each).__name__ == "MaxLengthCriteria"), None)


def _own_last(named: Sequence[tuple[str, Any]], custom: Sequence[Any]) -> list[Any]:
    """The built ones, each replaced by one of its class given by the program; then the rest of those."""
    of_class = {type(each).__name__: each for each in reversed(custom)}
    built = [of_class.get(name, each) for name, each in named]
    return [*built, *(each for each in custom if not any(each is used for used in built))]


# ---- filters ------------------------------------------------------------------------------------------


def _processors(asked: Mapping[str, Any], prompted: Prompted) -> Iterator[tuple[str, Filter]]:
    """Each filter of the options under the reference's name, except those for sampling."""
    ends = prompted.eos_token_ids

    def ids(name: str) -> Tensor:
        tokens = torch.as_tensor(asked[name], dtype=torch.long, device=ends.device).reshape(-1)
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < prompted.vocab_size):
            raise OptionError(f"{name} is {asked[name]!r}; this model has tokens of 0 to {prompted.vocab_size - 1}")
        return tokens

    if bias := asked.get("sequence_bias"):
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        yield "SequenceBiasLogitsProcessor", partial(sequence_bias, biases={tuple(ids): each for ids, each in pairs})
    if (penalty := asked.get("repetition_penalty", 1)) != 1:
        penalised = partial(filters.repetition_penalty, penalty=penalty)
        skipping = partial(_known, then=penalised, skipped_R1=prompted.skipped_R1)
        yield "RepetitionPenaltyLogitsProcessor", skipping
    if size := asked.get("no_repeat_ngram_size"):
        yield "NoRepeatNGramLogitsProcessor", partial(_known, then=partial(filters.no_repeat_ngram, size=size))
    if (words := asked.get("bad_words_ids")) is not None:
        is_list = isinstance(words, list | tuple) and len(words) > 0
        if not is_list or not all(isinstance(word, list | tuple) and word for word in words):
            raise OptionError(f"bad_words_ids is {words!r}; give a list of lists of token ids, such as [[12], [4, 7]]")
        biases = {tuple(word): RULED_OUT for word in words if not (len(word) == 1 and word[0] in ends.tolist())}
        yield "NoBadWordsLogitsProcessor", partial(sequence_bias, biases=biases)
    if prompted.min_new_tokens:
        least = partial(filters.min_length, min_new_tokens=prompted.length + prompted.min_new_tokens)
        yield "MinNewTokensLengthLogitsProcessor", partial(least, eos_token_ids=ends)
    if (allowed := asked.get("prefix_allowed_tokens_fn")) is not None:
        yield "PrefixConstrainedLogitsProcessor", partial(_allowed, allowed=allowed, num_beams=prompted.num_beams)
    if "forced_bos_token_id" in asked:
        yield "ForcedBOSTokenLogitsProcessor", partial(forced, at=1, token_ids=ids("forced_bos_token_id"))
    if "forced_eos_token_id" in asked:
        at = prompted.length + prompted.max_new_tokens - 1
        yield "ForcedEOSTokenLogitsProcessor", partial(forced, at=at, token_ids=ids("forced_eos_token_id"))
    if asked.get("remove_invalid_values"):
        yield "InfNanRemoveLogitsProcessor", lambda ids_RT, scores_RV: scores_RV.nan_to_num(nan=0.0)
    if (decay := asked.get("exponential_decay_length_penalty")) is not None:
        start, factor = decay
        rising = partial(rising_ends, start=prompted.length + start, factor=factor, eos_token_ids=ends)
        yield "ExponentialDecayLengthPenalty", rising
    if "suppress_tokens" in asked:
        yield "SuppressTokensLogitsProcessor", partial(filters.suppress, token_ids=ids("suppress_tokens"))
    if "begin_suppress_tokens" in asked:
        is_later = prompted.length <= 1 and "forced_bos_token_id" in asked
        begin = partial(suppressed_at, at=prompted.length + is_later, token_ids=ids("begin_suppress_tokens"))
        yield "SuppressTokensAtBeginLogitsProcessor", begin


def _warpers(asked: Mapping[str, Any], prompted: Prompted) -> Iterator[Filter]:
    """The filters for sampling. Beams keep one more token than there are end tokens, so that one of them continues."""
    if not asked.get("do_sample"):
        return
    least = prompted.num_ends + 1 if prompted.num_beams > 1 else 1
    if (temperature := asked.get("temperature", 1)) != 1:
        yield partial(filters.temperature, temperature=temperature)
    if top_k := asked.get("top_k", 50):
        yield partial(filters.top_k, k=max(top_k, least))
    if (top_p := asked.get("top_p", 1)) < 1:
        yield partial(filters.top_p, p=top_p, least=least)
    if min_p := asked.get("min_p"):
        yield partial(filters.min_p, p=min_p, least=least)
    if (typical_p := asked.get("typical_p", 1)) < 1:
        yield partial(filters.typical_p, p=typical_p, least=least)
    if 0 < asked.get("epsilon_cutoff", 0) < 1:
        yield partial(filters.epsilon_cutoff, epsilon=asked["epsilon_cutoff"], least=least)
    if 0 < asked.get("eta_cutoff", 0) < 1:
        yield partial(filters.eta_cutoff, epsilon=asked["eta_cutoff"], least=least)


def sequence_bias(ids_RT: Tensor, scores_RV: Tensor, *, biases: Mapping[tuple[int, ...], float]) -> Tensor:
    """Add to the score of a token that would complete a sequence; -inf forbids it."""
    bias_RV = torch.zeros_like(scores_RV)
    for (*before, token), bias in biases.items():
        if not 0 <= token < scores_RV.shape[1]:
            raise OptionError(
                f"{[*before, token]} ends with {token}; this model has tokens of 0 to {scores_RV.shape[1] - 1}"
            )
        if len(before) > ids_RT.shape[1]:
            continue
        last_RN = ids_RT[:, ids_RT.shape[1] - len(before) :]
        is_begun_R = (last_RN == torch.tensor(before, dtype=torch.long, device=ids_RT.device)).all(dim=1)
        bias_RV[:, token] += torch.where(is_begun_R, bias, 0.0)
    return scores_RV + bias_RV


def forced(ids_RT: Tensor, scores_RV: Tensor, *, at: int, token_ids: Tensor) -> Tensor:
    """Only allow these tokens at the position ``at``."""
    if ids_RT.shape[1] != at:
        return scores_RV
    return torch.full_like(scores_RV, RULED_OUT).index_fill(1, token_ids, 0)


def suppressed_at(ids_RT: Tensor, scores_RV: Tensor, *, at: int, token_ids: Tensor) -> Tensor:
    """Forbid these tokens at the position ``at``."""
    return filters.suppress(ids_RT, scores_RV, token_ids=token_ids) if ids_RT.shape[1] == at else scores_RV


def rising_ends(ids_RT: Tensor, scores_RV: Tensor, *, start: int, factor: float, eos_token_ids: Tensor) -> Tensor:
    """Raise the scores of end tokens from position ``start`` on, by powers of ``factor``; forbidden ones stay
    forbidden."""
    if (steps := ids_RT.shape[1] - start) <= 0:
        return scores_RV
    ends_RE = scores_RV[:, eos_token_ids]
    gain_RE = (ends_RE.abs() * (factor**steps - 1)).masked_fill(~ends_RE.isfinite(), 0.0)
    return scores_RV.index_add(1, eos_token_ids, gain_RE)


def _known(ids_RT: Tensor, scores_RV: Tensor, *, then: Filter, skipped_R1: Tensor | None = None) -> Tensor:
    """A filter that looks up ids in the scores; ids that do not exist there, and skipped ones, are ignored."""
    vocabulary = scores_RV.shape[1]
    ids_RT = ids_RT.clamp(max=vocabulary)
    if skipped_R1 is not None:
        ids_RT = ids_RT.masked_fill(torch.arange(ids_RT.shape[1], device=ids_RT.device) < skipped_R1, vocabulary)
    return then(ids_RT, torch.nn.functional.pad(scores_RV, (0, 1)))[:, :vocabulary]


def _allowed(
    ids_RT: Tensor, scores_RV: Tensor, *, allowed: Callable[[int, Tensor], Sequence[int]], num_beams: int
) -> Tensor:
    """Only allow the tokens that a function of the prompt's number and its ids returns."""
    mask_RV = torch.full_like(scores_RV, RULED_OUT)
    for row, ids_T in enumerate(ids_RT):
        tokens = allowed(row // num_beams, ids_T)
        if not len(tokens):
            raise OptionError(f"prefix_allowed_tokens_fn allows no token for prompt {row // num_beams}; allow one")
        mask_RV[row, tokens] = 0
    allowed_RV = scores_RV + mask_RV
    is_stuck_P1 = allowed_RV.amax(-1).isneginf().view(-1, num_beams).all(dim=1, keepdim=True)
    return torch.where(is_stuck_P1.repeat_interleave(num_beams, dim=0), mask_RV, allowed_RV)


# ---- criteria -----------------------------------------------------------------------------------------


def _is_long(ids_RT: Tensor, scores: Scores | None, *, longest: int) -> Tensor:
    return torch.full(ids_RT.shape[:1], ids_RT.shape[1] >= longest, device=ids_RT.device)


def _is_late(ids_RT: Tensor, scores: Scores | None, *, deadline_s: float) -> Tensor:
    return torch.full(ids_RT.shape[:1], time.monotonic() > deadline_s, device=ids_RT.device)


def _says(ids_RT: Tensor, scores: Scores | None, *, stops: Sequence[str], tokenizer: Any) -> Tensor:
    """Whether the last token completes a stop string, which may begin in the prompt."""
    is_over = []
    longest = max(map(len, stops))
    for ids in ids_RT[:, -longest - 1 :].tolist():
        text, before = tokenizer.decode(ids), tokenizer.decode(ids[:-1])
        is_over.append(any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in stops))
    return torch.tensor(is_over, device=ids_RT.device)
