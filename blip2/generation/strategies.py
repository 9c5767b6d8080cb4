"""The choice of the next token: for each row alone (greedy decoding, sampling), or by beam search.

A strategy is called by the loop in `blip2.generation.engine` with the logits of the next token, and returns the token
of each row and which rows continue. It keeps the state of the answers; the loop keeps the state of the language model.

P prompts, K beams, C candidates, R rows (a row is one running answer), T new tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blip2.generation import soundness
from blip2.generation.endings import Endings, FinishReason, Hypothesis
from blip2.generation.filters import RULED_OUT, Filter, apply_filters
from blip2.generation.options import GenerateOptions
from blip2.generation.sampler import Sampler

OnToken = Callable[[int, int], None]


class Choice(NamedTuple):
    """The rows that continue: the next token of each, and the present row that it continues."""

    tokens: list[int]
    rows: list[int] | None
    """None: all present rows in order."""


class Strategy(Protocol):
    rows_per_prompt: int

    def choose(self, logits_RV: Tensor) -> Choice | None:
        """Take the logits of each running row's next token; returns None when all answers have ended."""

    def answers(self) -> list[list[Hypothesis]]:
        """For each prompt its ``num_return`` answers, best first (fewer if no more texts are possible)."""


# --- Greedy decoding and sampling -----------------------------------------------------------------------------------

class Picked(NamedTuple):
    """A token for each row, and its log-probability from the model, before any filter."""

    tokens: list[int]
    log_probs: list[float]


def pick_most_likely(logits_RV: Tensor, ruled_out: Sequence[tuple[int, int]] = ()) -> Picked:
    """Greedy tokens of any rows at once; ``ruled_out``: pairs of a row and a token that it must not take."""
    logits_RV = scores_RV = logits_RV.float()
    if ruled_out:
        rows, tokens = torch.tensor(ruled_out, device=logits_RV.device).unbind(1)
        scores_RV = logits_RV.index_put((rows, tokens), torch.full((), RULED_OUT, device=logits_RV.device))
    tokens_R = scores_RV.argmax(-1)
    return _fetched(tokens_R, log_probs_of(logits_RV, tokens_R))[0]


def _fetched(tokens_R: Tensor, log_prob_R: Tensor, *more_RN: Tensor) -> tuple[Picked, list[list[float]]]:
    """Copies all results of a step from the GPU at once, since each copy waits for it; float64 holds both types
    exactly."""
    columns = [tokens_R[:, None], log_prob_R[:, None], *more_RN]
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()
    return Picked([int(row[0]) for row in rows], [row[1] for row in rows]), [row[2:] for row in rows]


def log_probs_of(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    """Log-probability of one token for each row, ``float32[R]``; NaN if any of the row's logits is NaN or infinite."""
    log_prob_RV = logits_RV.float().log_softmax(-1)
    return soundness.nan_if_invalid(log_prob_RV.gather(1, tokens_R[:, None])[:, 0], log_prob_RV)


class RowByRow:
    """Greedy decoding and sampling: a row that ended leaves the batch, without an effect on the others.

    `choose` picks and takes tokens. A caller that picks for many strategies at once calls `take` (see ``is_plain``).
    """

    def __init__(
        self,
        options: GenerateOptions,
        *,
        num_prompts: int,
        filters: Sequence[Filter],
        suppress_token_ids: Sequence[int],
        endings: Endings,
        on_token: OnToken | None = None,
        num_top: int = 0,
    ) -> None:
        self.rows_per_prompt = options.num_return
        needs_history = options.repetition_penalty != 1 or options.no_repeat_ngram_size
        self.is_plain = not (options.sample or needs_history or num_top)
        """Whether each row takes the most likely token that is not in `ruled_out`."""
        self._sampler = Sampler(options, num_prompts) if options.sample else None
        self._filters = filters
        self._suppress_token_ids = tuple(suppress_token_ids)
        self._min_new_tokens = options.min_new_tokens
        self._endings = endings
        self._on_token = on_token
        rows = num_prompts * options.num_return
        self._running = list(range(rows))  # original numbers of the rows still in the batch
        self._num_taken = 0
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        self.log_probs: list[list[float]] = [[] for _ in range(rows)]
        """Log-probability of each token that a row has taken so far, from the model."""
        self.top: list[list[dict[int, float]]] = [[] for _ in range(rows)]
        """At each place of a row the ``num_top`` most likely tokens, best first, with their log-probabilities."""
        self._num_top = num_top
        self._num_reported = [0] * rows
        self._answers: dict[int, Hypothesis] = {}

    @property
    def ruled_out(self) -> tuple[int, ...]:
        """Tokens that no row may take next, whatever came before."""
        is_early = self._num_taken < self._min_new_tokens
        return (*self._suppress_token_ids, *(self._endings.eos_token_ids if is_early else ()))

    def choose(self, logits_RV: Tensor) -> Choice | None:
        logits_RV = logits_RV.float()
        texts = [self._texts[row] for row in self._running]
        tokens_RT = torch.tensor(texts, dtype=torch.long, device=logits_RV.device)
        scores_RV = apply_filters(self._filters, tokens_RT, logits_RV)
        if self._sampler is None:
            tokens_R = scores_RV.argmax(-1)
        else:
            tokens_R = self._sampler(scores_RV, self._running, self._num_taken)
        is_out_R = scores_RV.gather(1, tokens_R[:, None])[:, 0] == RULED_OUT  # then all tokens are
        log_prob_R = log_probs_of(logits_RV, tokens_R) + torch.where(is_out_R, torch.inf, 0.0)
        if not self._num_top:
            return self.take(_fetched(tokens_R, log_prob_R)[0])
        best = logits_RV.log_softmax(-1).topk(min(self._num_top, logits_RV.shape[1]))
        picked, tops = _fetched(tokens_R, log_prob_R, best.indices, best.values)
        for row, top in zip(self._running, tops, strict=True):
            middle = len(top) // 2
            self.top[row].append(dict(zip(map(int, top[:middle]), top[middle:], strict=True)))
        return self.take(picked)

    def take(self, picked: Picked) -> Choice | None:
        """Each running row takes its token; returns None when all answers have ended. Raises as `soundness.check`."""
        soundness.check(picked.log_probs)
        self._num_taken += 1
        for row, log_prob in zip(self._running, picked.log_probs, strict=True):
            self.log_probs[row].append(log_prob)
        kept = [
            place
            for place, (row, token) in enumerate(zip(self._running, picked.tokens, strict=True))
            if not self._ends(row, token)
        ]
        if not kept:
            return None
        if len(kept) == len(self._running):
            return Choice(picked.tokens, None)
        self._running = [self._running[place] for place in kept]
        return Choice([picked.tokens[place] for place in kept], kept)

    def _ends(self, row: int, token: int) -> bool:
        """Whether a row ends with this token; records and reports it."""
        text = self._texts[row]
        text.append(token)
        reason = self._endings.reason(text)
        if reason is not None:
            text = self._endings.cut(text, reason)
            log_probs = self.log_probs[row]
            top = self.top[row][: len(text)] if self._num_top else None
            self._answers[row] = Hypothesis(text, sum(log_probs), reason, log_probs[: len(text)], top)
        if self._on_token is not None:
            certain = len(text) if reason is not None else self._endings.num_certain(text)
            for known in text[self._num_reported[row] : certain]:
                self._on_token(row, known)
            self._num_reported[row] = max(certain, self._num_reported[row])
        return reason is not None

    def answers(self) -> list[list[Hypothesis]]:
        rows = [self._answers[row] for row in range(len(self._texts))]
        each = self.rows_per_prompt
        return [
            sorted(rows[start : start + each], key=lambda answer: answer.score, reverse=True)
            for start in range(0, len(rows), each)
        ]


# --- Beam search -------------------------------------------------------------------------------------------------

REASONS: tuple[FinishReason | None, ...] = (None, "eos", "stop", "length")
EOS, STOP, LENGTH = 1, 2, 3
NAN = 2
"""Third value of the flag whether a prompt is over (0 or 1): its scores are NaN."""


class Ended(NamedTuple):
    """The best ended texts of each prompt, best first; a slot with ``reason`` 0 is free."""

    tokens_PKT: Tensor
    score_PK: Tensor
    reason_PK: Tensor
    length_PK: Tensor

    def select(self, index: Tensor) -> Ended:
        return Ended(*(part[index] for part in self))


class BeamSearch:
    """Beam search as in Hugging Face's ``generate`` since version 4.50: the same candidates, scores and stopping rule,
    for each prompt separately."""

    def __init__(
        self,
        options: GenerateOptions,
        *,
        num_prompts: int,
        filters: Sequence[Filter],
        endings: Endings,
        device: torch.device,
    ) -> None:
        self.rows_per_prompt = options.num_beams
        self._options = options
        self._filters = filters
        self._endings = endings
        self._eos = torch.tensor(sorted(endings.eos_token_ids), dtype=torch.long, device=device)
        # Enough for num_beams to continue even if the best candidates of each beam are all end tokens.
        self._num_candidates = max(2, 1 + len(self._eos)) * options.num_beams
        shape = (num_prompts, options.num_beams)
        self._step = 0
        self._tokens_PKT = torch.zeros(*shape, options.max_new_tokens, dtype=torch.long, device=device)
        self._score_PK = torch.zeros(shape, dtype=torch.float32, device=device)
        self._score_PK[:, 1:] = RULED_OUT  # all beams start equal: only the first one counts
        none_PK = torch.zeros(shape, dtype=torch.long, device=device)
        self._ended = Ended(self._tokens_PKT.clone(), torch.full_like(self._score_PK, RULED_OUT), none_PK, none_PK)
        self._prompts = list(range(num_prompts))  # original numbers of the prompts still in the batch
        self._answers: dict[int, list[Hypothesis]] = {}

    def choose(self, logits_RV: Tensor) -> Choice | None:
        num_beams = self._options.num_beams
        tokens_RT = self._tokens_PKT[:, :, : self._step].flatten(0, 1)
        log_prob_RV = logits_RV.float().log_softmax(-1)
        scores_RV = apply_filters(self._filters, tokens_RT, log_prob_RV)
        so_far_PK = soundness.nan_if_invalid(self._score_PK, log_prob_RV)
        total_PKV = scores_RV.unflatten(0, (-1, num_beams)) + so_far_PK[:, :, None]
        vocabulary = total_PKV.shape[-1]
        score_PC, which_PC = total_PKV.flatten(1).topk(min(self._num_candidates, num_beams * vocabulary))
        beam_PC = which_PC // vocabulary
        tokens_PCT = _take(self._tokens_PKT, beam_PC)
        tokens_PCT[:, :, self._step] = which_PC % vocabulary
        self._step += 1
        reason_PC = self._reasons(tokens_PCT)

        self._add_ended(tokens_PCT, score_PC, reason_PC)
        self._score_PK, going_PK = score_PC.masked_fill(reason_PC > 0, RULED_OUT).topk(num_beams)
        self._tokens_PKT = _take(tokens_PCT, going_PK)
        first_row_P1 = torch.arange(0, len(self._prompts) * num_beams, num_beams, device=going_PK.device)[:, None]
        rows_PK = first_row_P1 + _take(beam_PC, going_PK)

        is_nan_P1 = score_PC[:, :1].isnan()  # NaN sorts before all numbers
        over_P1 = torch.where(is_nan_P1, NAN, self._is_over_P()[:, None].long())
        # One row for each prompt with all results of this step, to wait for the GPU only once.
        fetched = torch.cat([over_P1, self._tokens_PKT[:, :, self._step - 1], rows_PK], dim=1).tolist()
        kept = self._drop_prompts_that_are_over([row[0] for row in fetched])
        if not kept:
            return None
        tokens = [token for place in kept for token in fetched[place][1 : 1 + num_beams]]
        return Choice(tokens, [row for place in kept for row in fetched[place][1 + num_beams :]])

    def _reasons(self, tokens_PCT: Tensor) -> Tensor:
        """Why each candidate ends: an index of ``REASONS``, 0 if it continues."""
        reason_PC = torch.isin(tokens_PCT[:, :, self._step - 1], self._eos) * EOS
        if self._endings.stop:
            texts = tokens_PCT[:, :, : self._step].tolist()
            stops = [[self._endings.reason(text) == "stop" for text in candidates] for candidates in texts]
            reason_PC = torch.where(torch.tensor(stops, device=reason_PC.device), STOP, reason_PC)
        if self._step == self._options.max_new_tokens:
            reason_PC = torch.where(reason_PC > 0, reason_PC, LENGTH)
        return reason_PC

    def _add_ended(self, tokens_PCT: Tensor, score_PC: Tensor, reason_PC: Tensor) -> None:
        """Merge candidates that ended into the best ended texts.

        Only the first ``num_beams`` candidates may end; the others exist to continue in their place.
        """
        num_beams = self._options.num_beams
        may_end_C = torch.arange(score_PC.shape[1], device=score_PC.device) < num_beams
        reason_PC = reason_PC * (may_end_C & (score_PC > RULED_OUT))
        if reason_PC.device.type == "cpu" and not reason_PC.any():  # on a GPU asking costs more than merging nothing
            return
        score_PC = score_PC / (self._step**self._options.length_penalty)
        score_PC = score_PC.masked_fill(reason_PC == 0, RULED_OUT)
        merged_score_PM = torch.cat([self._ended.score_PK, score_PC], dim=1)
        score_PK, best_PK = merged_score_PM.topk(num_beams)
        self._ended = Ended(
            _take(torch.cat([self._ended.tokens_PKT, tokens_PCT], dim=1), best_PK),
            score_PK,
            _take(torch.cat([self._ended.reason_PK, reason_PC], dim=1), best_PK),
            _take(torch.cat([self._ended.length_PK, torch.full_like(reason_PC, self._step)], dim=1), best_PK),
        )

    def _drop_prompts_that_are_over(self, over: list[int]) -> list[int]:
        """The places of the prompts that continue; the answers of the others, marked 1 in ``over``, are stored."""
        soundness.check(math.nan if each == NAN else 0.0 for each in over)
        for place, is_over in enumerate(over):
            if is_over:
                self._answers[self._prompts[place]] = self._best(place)
        kept = [place for place, is_over in enumerate(over) if not is_over]
        if len(kept) < len(over):
            self._prompts = [self._prompts[place] for place in kept]
            kept_P = torch.tensor(kept, dtype=torch.long, device=self._score_PK.device)
            self._tokens_PKT, self._score_PK = self._tokens_PKT[kept_P], self._score_PK[kept_P]
            self._ended = self._ended.select(kept_P)
        return kept

    def _is_over_P(self) -> Tensor:
        """Prompts whose ended texts are final: all slots are full, and no open beam is expected to be better."""
        options = self._options
        if self._step == options.max_new_tokens:
            return torch.ones(len(self._prompts), dtype=torch.bool, device=self._score_PK.device)
        is_ended_PK = self._ended.reason_PK > 0
        length = self._step
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = options.max_new_tokens
        best_possible_P1 = self._score_PK[:, :1] / (length**options.length_penalty)
        worst_PK = torch.where(is_ended_PK, self._ended.score_PK.amin(1, keepdim=True), RULED_OUT)
        is_over_P = (best_possible_P1 <= worst_PK).all(1)
        return is_over_P | is_ended_PK.all(1) if options.early_stopping is True else is_over_P

    def _best(self, place: int) -> list[Hypothesis]:
        """The answers to the prompt at this place of the batch."""
        ended = Ended(*(part[place] for part in self._ended))
        best = []
        for tokens, score, code, length in zip(*(part.tolist() for part in ended), strict=True):
            if (reason := REASONS[code]) is not None:  # a slot is free only if there are too few texts
                best.append(Hypothesis(self._endings.cut(tokens[:length], reason), score, reason))
        if not best:
            raise soundness.nothing_left()
        return best[: self._options.num_return]

    def answers(self) -> list[list[Hypothesis]]:
        return [self._answers[prompt] for prompt in range(len(self._answers))]


def _take(values_PK: Tensor, index_PN: Tensor) -> Tensor:
    """For each prompt, the given entries of its second dimension: ``[P, K, ...] -> [P, N, ...]``."""
    if len(index_PN) == 1:  # a server's jobs have one prompt each, so this case matters
        return values_PK[0].index_select(0, index_PN[0])[None]
    prompts_P1 = torch.arange(len(index_PN), device=index_PN.device)[:, None]
    return values_PK[prompts_P1, index_PN]
