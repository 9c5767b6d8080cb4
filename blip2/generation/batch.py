"""Continuous batching: requests join and leave a batch between steps, without an effect on each other.

A job is a number of prompts with the same options and a strategy of its own; its rows are adjacent in the batch. Each
step asks every job's strategy for the next tokens of its rows, then passes all rows through the language model at once.
For few rows that takes as long as for one: the time to read the weights.

R rows of all jobs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from blip2.generation.endings import Hypothesis
from blip2.generation.replay import replay_of
from blip2.generation.strategies import Choice, Picked, RowByRow, Strategy, pick_most_likely
from blip2.language import LanguageModel, pad_rows


class Job:
    """Prompts ``float[T_i, D]`` and how to answer them; made by `Engine.job`."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        strategy: Strategy,
        num_new_tokens: int,
        explained: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        """``explained``: replaces an error that ended the job by the one to raise."""
        self.prompts = prompts
        self.strategy = strategy
        self.num_new_tokens = num_new_tokens
        self.num_rows = len(prompts) * strategy.rows_per_prompt
        """Number of rows that the job has in a batch; 0 when it is over."""
        self.error: Exception | None = None
        """The error that ended the job early: NaN or infinite logits, or an exception of its token callback."""
        self._explained = explained

    @property
    def is_over(self) -> bool:
        return self.num_rows == 0

    def answers(self) -> list[list[Hypothesis]]:
        """For each prompt its answers, best first. Raises ``error`` if there is one."""
        assert self.is_over
        if self.error is not None:
            raise self._explained(self.error)
        return self.strategy.answers()


class Batch:
    """The running rows, with the language model's state of each. Not thread-safe."""

    def __init__(self, language: LanguageModel) -> None:
        self._language = language
        self._jobs: list[Job] = []
        self._logits_RV: Tensor | None = None
        self._state: Any = None

    @property
    def num_rows(self) -> int:
        return sum(job.num_rows for job in self._jobs)

    @torch.inference_mode()
    def add(self, jobs: Sequence[Job]) -> None:
        """Prefill the prompts of jobs and add their rows; the next step generates the first token of each.

        Jobs with the same limit of tokens are prefilled in one pass.
        """
        by_length = sorted(jobs, key=lambda job: job.num_new_tokens)
        for num_new_tokens, some in groupby(by_length, key=lambda job: job.num_new_tokens):
            self._read(list(some), num_new_tokens)

    def _read(self, jobs: list[Job], num_new_tokens: int) -> None:
        prompts = [prompt for job in jobs for prompt in job.prompts]
        logits_RV, state = self._language.prefill(*pad_rows(prompts), num_new_tokens)
        if any(job.strategy.rows_per_prompt > 1 for job in jobs):  # prompts are prefilled once
            copies = [job.strategy.rows_per_prompt for job in jobs for _ in job.prompts]
            rows_R = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(logits_RV.device)
            state.select(rows_R)
            logits_RV = logits_RV[rows_R]
        if self._logits_RV is None:
            self._logits_RV, self._state = logits_RV, state
        else:
            self._logits_RV = torch.cat([self._logits_RV, logits_RV])
            self._state.join(state)
        self._jobs += jobs

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Generate one token for every row; returns the jobs that ended and have left the batch."""
        if self._logits_RV is None:
            return []
        picked = self._picked(self._logits_RV)
        tokens: list[int] = []
        rows: list[int] = []
        over = []
        first = 0
        for job in self._jobs:
            here = range(first, first + job.num_rows)
            first = here.stop
            choice = self._choose(job, self._logits_RV, here, picked)
            if choice is None:
                job.num_rows = 0
                over.append(job)
                continue
            tokens += choice.tokens
            rows += here if choice.rows is None else [here[row] for row in choice.rows]
            job.num_rows = len(choice.tokens)
        self._jobs = [job for job in self._jobs if not job.is_over]
        device = self._logits_RV.device
        if not self._jobs:
            self._logits_RV = self._state = None
            return over
        if rows != list(range(first)):
            self._state.select(torch.tensor(rows, device=device))
        if any(job.error is not None for job in over):
            self._state.forget()
        stepping = replay_of(self._language) if isinstance(self._language, nn.Module) else self._language
        self._logits_RV = stepping.step(torch.tensor(tokens, device=device), self._state)
        return over

    def _picked(self, logits_RV: Tensor) -> Picked | None:
        """The greedy token of every row; not used for rows whose job needs another choice.

        For all jobs at once, since a small operation takes as long for one row as for many.
        """
        ruled_out: list[tuple[int, int]] = []
        first = 0
        is_wanted = False
        for job in self._jobs:
            if is_plain(job.strategy):
                is_wanted = True
                ids = job.strategy.ruled_out
                ruled_out += [(row, token) for row in range(first, first + job.num_rows) for token in ids]
            first += job.num_rows
        return pick_most_likely(logits_RV, ruled_out) if is_wanted else None

    @torch.inference_mode()
    def drop(self, job: Job) -> None:
        """Remove a job before it ends; its rows are free at once."""
        if job.is_over:
            return
        assert self._logits_RV is not None
        kept = [
            torch.full((each.num_rows,), each is not job, dtype=torch.bool, device=self._logits_RV.device)
            for each in self._jobs
        ]
        job.num_rows = 0
        self._jobs.remove(job)
        if not self._jobs:
            self._logits_RV = self._state = None
            return
        rows_R = torch.cat(kept).nonzero()[:, 0]
        self._logits_RV = self._logits_RV[rows_R]
        self._state.select(rows_R)
        self._state.forget()  # its last step may have produced NaN

    @staticmethod
    def _choose(job: Job, logits_RV: Tensor, here: range, picked: Picked | None) -> Choice | None:
        """The job's next tokens; None if it ended, by itself or by an exception of its callback."""
        own = slice(here.start, here.stop)
        try:
            if picked is not None and is_plain(job.strategy):
                return job.strategy.take(Picked(picked.tokens[own], picked.log_probs[own]))
            return job.strategy.choose(logits_RV[own])
        except Exception as error:
            job.error = error
            return None


def is_plain(strategy: Strategy) -> TypeGuard[RowByRow]:
    """Greedy decoding without filters, which does not need logits of its own."""
    return isinstance(strategy, RowByRow) and strategy.is_plain
