"""Answers that are written side by side: requests come and go between steps, and none notices the others.

A job is some prompts under one set of options, with a strategy of its own; its rows lie side by side in the batch.
Each step asks every job's strategy for its rows' next tokens, and then passes all rows through the language model at
once, which for few rows takes the time of one: reading the weights.

R rows of all jobs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from blip2.generation.endings import Hypothesis
from blip2.generation.strategies import Choice, Strategy
from blip2.language import LanguageModel, pad_rows


class Job:
    """Some prompts ``float[T_i, D]`` and how they are answered; `Engine.job` makes one."""

    def __init__(self, prompts: Sequence[Tensor], strategy: Strategy, num_new_tokens: int) -> None:
        self.prompts = prompts
        self.strategy = strategy
        self.num_new_tokens = num_new_tokens
        self.num_rows = len(prompts) * strategy.rows_per_prompt
        """How many rows of a batch are this job's, at present; 0 when it is over."""
        self.error: Exception | None = None
        """What ended it before its answers were there: whoever listened to its tokens raised this."""

    @property
    def is_over(self) -> bool:
        return self.num_rows == 0

    def answers(self) -> list[list[Hypothesis]]:
        """For each prompt its answers, best first. Raises ``error`` if there is one."""
        assert self.is_over
        if self.error is not None:
            raise self.error
        return self.strategy.answers()


class Batch:
    """The rows in work and the language model's state of each. Not to be used by two threads at once."""

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
        """Read the prompts of jobs and take them in; the next step writes the first token of each.

        Those that may grow equally long are read in one pass.
        """
        by_length = sorted(jobs, key=lambda job: job.num_new_tokens)
        for num_new_tokens, some in groupby(by_length, key=lambda job: job.num_new_tokens):
            self._read(list(some), num_new_tokens)

    def _read(self, jobs: list[Job], num_new_tokens: int) -> None:
        prompts = [prompt for job in jobs for prompt in job.prompts]
        logits_RV, state = self._language.prefill(*pad_rows(prompts), num_new_tokens)
        if any(job.strategy.rows_per_prompt > 1 for job in jobs):  # a prompt is read once, its state copied to its rows
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
        """One token more for every row; the jobs that are over now, which have left the batch."""
        if self._logits_RV is None:
            return []
        tokens, rows, over = [], [], []
        first = 0
        is_changed = False
        for job in self._jobs:
            logits = self._logits_RV[first : first + job.num_rows]
            choice = self._choose(job, logits)
            here_R = torch.arange(first, first + job.num_rows, device=logits.device)
            first += job.num_rows
            if choice is None:
                job.num_rows = 0
                over.append(job)
                is_changed = True
                continue
            if choice.rows_R is not None:
                here_R = here_R[choice.rows_R]
                job.num_rows = len(here_R)
                is_changed = True
            tokens.append(choice.tokens_R)
            rows.append(here_R)
        self._jobs = [job for job in self._jobs if not job.is_over]
        if not self._jobs:
            self._logits_RV = self._state = None
            return over
        if is_changed:
            self._state.select(torch.cat(rows))
        self._logits_RV = self._language.step(torch.cat(tokens), self._state)
        return over

    @torch.inference_mode()
    def drop(self, job: Job) -> None:
        """Take a job out before it is over; its rows are free at once."""
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

    @staticmethod
    def _choose(job: Job, logits_RV: Tensor) -> Choice | None:
        """The job's next tokens; None where it is over, by itself or because its listener raised."""
        try:
            return job.strategy.choose(logits_RV)
        except Exception as error:
            job.error = error
            return None
