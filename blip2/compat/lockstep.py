"""Decoding as in Hugging Face's ``generate``: all rows stay together, even finished ones.

In this package's engine a row leaves when it is finished. Here a finished row is padded until the last one is finished,
since scores, processors, criteria and streamers get all rows at every step, and samples are drawn for all rows at once,
with torch's random numbers as in the reference.

P prompts, K beams, C candidates, R rows, T ids so far (the prompt's first), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blip2.errors import NotFiniteError, OptionError
from blip2.generation.filters import Filter, apply_filters
from blip2.generation.soundness import nothing_left
from blip2.generation.strategies import Choice
from blip2.language import LanguageModel, pad_rows

Scores = tuple[Tensor, ...]
Criterion = Callable[[Tensor, Scores | None], Tensor]
"""Ids ``int[R, T]`` and each step's scores, if kept, to ``bool[R]``: which rows are finished."""
FAR_BELOW = -1e9  # less than any log-probability; forbidden tokens have -inf


@dataclass(frozen=True)
class DecodingSettings:
    """Settings of both decoding strategies."""

    filters: Sequence[Filter]
    """They also see the prompt's ids."""
    criteria: Sequence[Criterion]
    max_new_tokens: int
    num_ends: int
    fill_token_id: int
    sample: bool = False
    num_beams: int = 1
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    keeps_scores: bool = False
    keeps_logits: bool = False
    keeps_ids: bool = False
    streamer: Any = None

    def is_over(self, ids_RT: Tensor, scores: Scores | None) -> Tensor:
        """``bool[R]``: which rows meet one of the criteria."""
        is_over_R = torch.zeros(len(ids_RT), dtype=torch.bool, device=ids_RT.device)
        for criterion in self.criteria:
            is_over_R = is_over_R | torch.as_tensor(criterion(ids_RT, scores), device=ids_RT.device)
        return is_over_R


class Written(NamedTuple):
    """The result: ids ``int[B * num_return, T]`` with the prompt's, and what was requested to be kept."""

    sequences: Tensor
    scores: Scores | None
    """Of each step ``float[R, V]``, after the filters: logits, or with beams log-probabilities."""
    logits: Scores | None
    """Of each step ``float[R, V]``, as computed by the model."""
    ids: Scores | None
    """The input ids of each step, ``int[R, T]``."""
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
    """With beams: the row of ``scores`` in which each new token was chosen; -1 after the end."""


def write(language: LanguageModel, prompts: Sequence[Tensor], ids_BT: Tensor, settings: DecodingSettings) -> Written:
    """Generate after prompts ``float[T_i, D]``, whose ids are ``int[B, T]``."""
    copies = settings.num_beams if settings.num_beams > 1 else settings.num_return
    repeated_BT = ids_BT if settings.num_beams > 1 else ids_BT.repeat_interleave(copies, dim=0)
    strategy = (Beams if settings.num_beams > 1 else Rows)(repeated_BT, settings)
    if settings.streamer is not None:
        settings.streamer.put(ids_BT.repeat_interleave(copies, dim=0).cpu())
    logits_RV, state = language.prefill(*pad_rows(list(prompts)), settings.max_new_tokens)
    if copies > 1:
        rows_R = torch.arange(len(prompts), device=logits_RV.device).repeat_interleave(copies)
        state.select(rows_R)
        logits_RV = logits_RV[rows_R]
    while (choice := strategy.choose(logits_RV.to(ids_BT.device, torch.float32))) is not None:
        device = logits_RV.device
        if choice.rows is not None:
            state.select(torch.tensor(choice.rows, device=device))
        logits_RV = language.step(torch.tensor(choice.tokens, device=device), state)
    if settings.streamer is not None:
        settings.streamer.end()
    return strategy.written()


class Rows:
    """Greedy decoding and sampling."""

    def __init__(self, ids_RT: Tensor, settings: DecodingSettings) -> None:
        self._settings = settings
        self._ids_RT = ids_RT
        self._is_running_R = torch.ones(len(ids_RT), dtype=torch.bool, device=ids_RT.device)
        self._kept = Kept(settings)

    def choose(self, logits_RV: Tensor) -> Choice | None:
        settings = self._settings
        scores_RV = apply_filters(settings.filters, self._ids_RT, logits_RV.clone())
        check(logits_RV, scores_RV[self._is_running_R])
        self._kept.add(scores_RV, logits_RV, self._ids_RT)
        if settings.sample:
            tokens_R = scores_RV.softmax(-1).multinomial(1)[:, 0]
        else:
            tokens_R = scores_RV.argmax(-1)
        tokens_R = tokens_R.masked_fill(~self._is_running_R, settings.fill_token_id)
        self._ids_RT = torch.cat([self._ids_RT, tokens_R[:, None]], dim=1)
        self._is_running_R &= ~settings.is_over(self._ids_RT, self._kept.scores)
        if settings.streamer is not None:
            settings.streamer.put(tokens_R.cpu())
        return Choice(tokens_R.tolist(), None) if self._is_running_R.any() else None

    def written(self) -> Written:
        return Written(self._ids_RT, self._kept.scores, self._kept.logits, self._kept.ids)


class Beams:
    """Beam search; `generation.BeamSearch` gives the same sequences if nothing watches."""

    def __init__(self, ids_PT: Tensor, settings: DecodingSettings) -> None:
        prompts, self._start = ids_PT.shape
        shape, device = (prompts, settings.num_beams), ids_PT.device
        self._settings = settings
        self._length = self._start
        self._first_row_P1 = torch.arange(0, prompts * settings.num_beams, settings.num_beams, device=device)[:, None]
        ids_PKT = torch.full((*shape, self._start + settings.max_new_tokens), settings.fill_token_id, device=device)
        ids_PKT[:, :, : self._start] = ids_PT[:, None]
        rows_PKT = torch.full((*shape, settings.max_new_tokens), -1, dtype=torch.int32, device=device)
        score_PK = torch.full(shape, FAR_BELOW, dtype=torch.float32, device=device)
        self._running = Texts(ids_PKT, rows_PKT, score_PK.clone(), torch.zeros(shape, dtype=torch.bool, device=device))
        self._running.score[:, 0] = 0  # all beams start equal, so only the first one counts
        self._ended = Texts(ids_PKT.clone(), rows_PKT.clone(), score_PK, self._running.is_over)
        self._may_improve_P1 = torch.ones(prompts, 1, dtype=torch.bool, device=device)
        self._kept = Kept(settings)

    def choose(self, logits_RV: Tensor) -> Choice | None:
        settings = self._settings
        log_probs_RV = logits_RV.log_softmax(-1)
        ids_RT = self._running.ids[:, :, : self._length].flatten(0, 1)
        scores_RV = apply_filters(settings.filters, ids_RT, log_probs_RV)
        best_PK = scores_RV.amax(-1).unflatten(0, (-1, settings.num_beams)) + self._running.score
        best_P = best_PK.amax(dim=1, keepdim=True)
        check(logits_RV, best_P[self._may_improve_P1[:, 0]])
        self._kept.add(scores_RV, logits_RV, ids_RT)
        candidates = self._candidates(scores_RV)
        self._length += 1

        # Finished candidates do not continue. Only the first K may end; the others replace those that do.
        score_PC = candidates.score + candidates.is_over * FAR_BELOW
        self._running = candidates._replace(score=score_PC).select(score_PC.topk(settings.num_beams).indices)
        self._add_ended(candidates)
        self._may_improve_P1 = self._may_improve_P1 & self._can_improve_P1()
        is_full = settings.early_stopping is True and bool(self._ended.is_over.all())
        if is_full or not self._may_improve_P1.any() or candidates.is_over.all():
            return None
        last = self._length - 1
        rows_R = self._running.rows[:, :, last - self._start].flatten()
        return Choice(self._running.ids[:, :, last].flatten().tolist(), rows_R.tolist())

    def _candidates(self, scores_RV: Tensor) -> Texts:
        """The best (or sampled) continuations of each prompt: enough that K continue even if K end."""
        settings = self._settings
        vocabulary = scores_RV.shape[1]
        total_PN = (scores_RV.unflatten(0, (-1, settings.num_beams)) + self._running.score[:, :, None]).flatten(1)
        count = min(max(2, 1 + settings.num_ends) * settings.num_beams, total_PN.shape[1])
        if settings.sample:
            which_PC = total_PN.softmax(-1).multinomial(count)
        else:
            which_PC = total_PN.topk(count).indices
        beam_PC = which_PC // vocabulary
        chosen = self._running.select(beam_PC)
        chosen.ids[:, :, self._length] = which_PC % vocabulary
        chosen.rows[:, :, self._length - self._start] = beam_PC + self._first_row_P1
        ids_RT = chosen.ids[:, :, : self._length + 1].flatten(0, 1)
        is_over_PC = settings.is_over(ids_RT, self._kept.scores).unflatten(0, which_PC.shape)
        return chosen._replace(score=total_PN.gather(1, which_PC), is_over=is_over_PC)

    def _add_ended(self, candidates: Texts) -> None:
        """Merge finished candidates into the best finished texts, where these may still change."""
        settings = self._settings
        place_C = torch.arange(candidates.score.shape[1], device=candidates.score.device)
        is_over_PC = candidates.is_over & (place_C < settings.num_beams)
        is_final_P1 = ~self._may_improve_P1
        if settings.early_stopping is True:
            is_final_P1 = is_final_P1 | self._ended.is_over.all(dim=1, keepdim=True)
        score_PC = candidates.score / (self._length - self._start) ** settings.length_penalty
        score_PC = score_PC + is_final_P1 * FAR_BELOW + ~is_over_PC * FAR_BELOW
        new = candidates._replace(score=score_PC, is_over=is_over_PC)
        both = Texts(*(torch.cat(parts, dim=1) for parts in zip(self._ended, new, strict=True)))
        self._ended = both.select(both.score.topk(settings.num_beams).indices)

    def _can_improve_P1(self) -> Tensor:
        """Whether the best open beam may still become better than the worst finished text."""
        settings = self._settings
        length = self._length - self._start
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = settings.max_new_tokens
        best_possible_P1 = self._running.score[:, :1] / length**settings.length_penalty
        worst_PK = torch.where(self._ended.is_over, self._ended.score.amin(1, keepdim=True), FAR_BELOW)
        return (best_possible_P1 > worst_PK).any(dim=1, keepdim=True)

    def written(self) -> Written:
        best = Texts(*(part[:, : self._settings.num_return].flatten(0, 1) for part in self._ended))
        longest = int((best.rows >= 0).sum(dim=1).max())
        return Written(
            best.ids[:, : self._start + longest],
            self._kept.scores,
            self._kept.logits,
            self._kept.ids,
            best.score if self._settings.keeps_scores else None,
            best.rows[:, :longest],
        )


def check(logits_RV: Tensor, scores_RN: Tensor) -> None:
    """Raises NotFiniteError for non-finite logits, OptionError for NaN scores or if no token is left."""
    if not logits_RV.isfinite().all():
        raise NotFiniteError("the scores of the next token are NaN or infinite")
    best_R = scores_RN.amax(-1)
    if best_R.isnan().any():
        raise OptionError("a logits_processor returns NaN scores, from which no token can be chosen; fix it")
    if best_R.isneginf().any():
        raise nothing_left()


class Texts(NamedTuple):
    """Texts of each prompt: ids, the row in which each new token was chosen, score, and whether they are finished."""

    ids: Tensor
    rows: Tensor
    score: Tensor
    is_over: Tensor

    def select(self, index_PN: Tensor) -> Texts:
        """The texts of each prompt with these indices."""
        prompts_P1 = torch.arange(len(index_PN), device=index_PN.device)[:, None]
        return Texts(*(part[prompts_P1, index_PN] for part in self))


class Kept:
    """Scores, logits and ids of each step, as requested."""

    def __init__(self, settings: DecodingSettings) -> None:
        self.scores: Scores | None = () if settings.keeps_scores else None
        self.logits: Scores | None = () if settings.keeps_logits else None
        self.ids: Scores | None = () if settings.keeps_ids else None

    def add(self, scores_RV: Tensor, logits_RV: Tensor, ids_RT: Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores_RV,)
        if self.logits is not None:
            self.logits += (logits_RV,)
        if self.ids is not None:
            self.ids += (ids_RT,)
