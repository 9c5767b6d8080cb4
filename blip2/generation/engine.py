"""Prompts in, answers out: the one loop that all decoding goes through.

A prompt is a sequence of vectors (image queries and embedded words alike), an answer a list of token ids; nothing
here knows of pictures or, but for stop strings, of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip2.errors import OptionError
from blip2.generation.endings import Decode, Endings, Hypothesis
from blip2.generation.filters import build_filters
from blip2.generation.options import GenerateOptions
from blip2.generation.strategies import BeamSearch, OnToken, RowByRow, Strategy
from blip2.language import LanguageModel, pad_rows


class Engine:
    """Decodes with one language model.

    All prompts of a call run as one batch; how many fit is the caller's business. An answer does not depend on
    what else is in the batch.

    - ``eos_token_ids``: any of these ends an answer.
    - ``suppress_token_ids``: never written: the image token, rows of the vocabulary that stand for no text.
    - ``decode``: token ids to text; needed for stop strings only.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        eos_token_ids: Sequence[int],
        suppress_token_ids: Sequence[int] = (),
        decode: Decode | None = None,
    ) -> None:
        self.language = language
        self.eos_token_ids = tuple(eos_token_ids)
        self.suppress_token_ids = tuple(suppress_token_ids)
        self.decode = decode

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tensor], options: GenerateOptions | None = None, *, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        """For each prompt ``float[T_i, D]`` its ``num_return`` answers, best first.

        ``on_token(prompt number, token)`` is called for each token of an answer as soon as it is sure to belong to
        it. Raises `OptionError` where options need what is not there: stop strings without ``decode``, ``on_token``
        with more than one running answer to a prompt.
        """
        options = options or GenerateOptions()
        if on_token is not None and (options.num_beams > 1 or options.num_return > 1):
            raise OptionError(
                f"on_token follows one answer to a prompt, not num_beams={options.num_beams} and "
                f"num_return={options.num_return}; set both to 1"
            )
        endings = Endings(options, self.eos_token_ids, self.decode)
        if not prompts:
            return []
        strategy = self._strategy(options, endings, len(prompts), prompts[0].device, on_token)

        logits_RV, state = self._prefill(prompts, options.max_new_tokens)
        if strategy.rows_per_prompt > 1:  # a prompt is read once, then its state is copied to its rows
            rows_R = torch.arange(len(prompts), device=logits_RV.device).repeat_interleave(strategy.rows_per_prompt)
            state.select(rows_R)
            logits_RV = logits_RV[rows_R]
        while (choice := strategy.choose(logits_RV)) is not None:
            if choice.rows_R is not None:
                state.select(choice.rows_R)
            logits_RV = self.language.step(choice.tokens_R, state)
        return strategy.answers()

    @torch.inference_mode()
    def score(self, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability of each answer (token ids) after its prompt ``float[T_i, D]``, as the model gives it.

        An end token counts only where the answer has it. An empty answer scores 0.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts, but {len(answers)} answers; give each answer its prompt")
        if not prompts:
            return []
        # Longest answer first, so that the rows which are over are the last ones.
        order = sorted(range(len(answers)), key=lambda number: len(answers[number]), reverse=True)
        longest = len(answers[order[0]])
        logits_RV, state = self._prefill([prompts[number] for number in order], longest)
        total_R = torch.zeros(len(order), device=logits_RV.device)
        for place in range(longest):
            tokens = [answers[number][place] for number in order if len(answers[number]) > place]
            tokens_R = torch.tensor(tokens, dtype=torch.long, device=logits_RV.device)
            if len(tokens) < len(logits_RV):
                state.select(torch.arange(len(tokens), device=logits_RV.device))
                logits_RV = logits_RV[: len(tokens)]
            log_prob_R1 = logits_RV.float().log_softmax(-1).gather(1, tokens_R[:, None])
            total_R[: len(tokens)] += log_prob_R1[:, 0]
            if place + 1 < longest:
                logits_RV = self.language.step(tokens_R, state)
        score_of = dict(zip(order, total_R.tolist(), strict=True))
        return [score_of[number] for number in range(len(answers))]

    def _prefill(self, prompts: Sequence[Tensor], num_new_tokens: int) -> tuple[Tensor, Any]:
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number} is empty; a prompt has one vector or more")
        return self.language.prefill(*pad_rows(list(prompts)), num_new_tokens)

    def _strategy(
        self,
        options: GenerateOptions,
        endings: Endings,
        num_prompts: int,
        device: torch.device,
        on_token: OnToken | None,
    ) -> Strategy:
        filters = build_filters(
            options, eos_token_ids=self.eos_token_ids, suppress_token_ids=self.suppress_token_ids, device=device
        )
        if options.num_beams > 1:
            return BeamSearch(options, num_prompts=num_prompts, filters=filters, endings=endings, device=device)
        return RowByRow(
            options, num_prompts=num_prompts, filters=filters, endings=endings, device=device, on_token=on_token
        )
