"""Prompts in, answers out: what all decoding goes through.

A prompt is a sequence of vectors (image queries and embedded words alike), an answer a list of token ids; nothing
here knows of pictures or, but for stop strings, of text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from blip2 import threads
from blip2.errors import NotFiniteError, OptionError, option
from blip2.finite import is_finite, overflow
from blip2.generation import soundness
from blip2.generation.batch import Batch, Job
from blip2.generation.endings import Decode, Endings, Hypothesis
from blip2.generation.filters import build_filters
from blip2.generation.options import GenerateOptions
from blip2.generation.strategies import BeamSearch, OnToken, RowByRow, Strategy, log_probs_of
from blip2.language import LanguageModel, pad_rows

Value = TypeVar("Value")


def finished(steps: Generator[None, None, Value]) -> Value:
    """What work that can be done in portions returns, done without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: Value = end.value
            return value


class Engine:
    """Decodes with one language model.

    All prompts of a call run as one batch; how many fit is the caller's business. A server keeps one `Batch` running,
    which requests enter and leave (`job`). An answer does not depend on what else is in the batch.

    - ``eos_token_ids``: any of these ends an answer.
    - ``suppress_token_ids``: never written: the image token, rows of the vocabulary that stand for no text.
    - ``decode``: token ids to text; needed for stop strings only.
    - ``damage``: the weights that are NaN or infinite, in words, or None; asked only where scores are.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        eos_token_ids: Sequence[int],
        suppress_token_ids: Sequence[int] = (),
        decode: Decode | None = None,
        damage: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.language = language
        self.eos_token_ids = tuple(eos_token_ids)
        self.suppress_token_ids = tuple(suppress_token_ids)
        self.decode = decode
        self._damage = damage
        self._num_threads = threads.worth(language)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tensor], options: GenerateOptions | None = None, *, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        """For each prompt ``float[T_i, D]`` its ``num_return`` answers, best first.

        ``on_token(prompt number, token)`` is called for each token of an answer as soon as it is sure to belong to
        it. Raises `OptionError` where options need what is not there: stop strings without ``decode``, ``on_token``
        with more than one running answer to a prompt; or where they rule out every token. Raises `NotFiniteError` where
        the model's scores are NaN or infinite.
        """
        with threads.at_most(self._num_threads):
            return finished(self.generating(prompts, options, on_token=on_token))

    def generating(
        self, prompts: Sequence[Tensor], options: GenerateOptions | None = None, *, on_token: OnToken | None = None
    ) -> Generator[None, None, list[list[Hypothesis]]]:
        """As `generate`, for who has other work between two tokens: what the generator returns are the answers."""
        if not prompts:
            return []
        batch = Batch(self.language)
        job = self.job(prompts, options or GenerateOptions(), on_token=on_token)
        batch.add([job])
        while not job.is_over:
            yield
            batch.step()
        return job.answers()

    def job(
        self,
        prompts: Sequence[Tensor],
        options: GenerateOptions,
        *,
        on_token: OnToken | None = None,
        num_top: int = 0,
    ) -> Job:
        """The same as `generate` for a batch of this engine's language model that is running (`Batch.add`).

        ``on_token`` is called while the batch steps; what it raises ends this job alone. ``num_top``: so many of the
        most likely tokens are noted at each place (`Hypothesis.top`); not with beams.
        """
        if on_token is not None and (options.num_beams > 1 or options.num_return > 1):
            raise OptionError(
                f"on_token follows one answer to a prompt, and {option('num_beams')} is {options.num_beams}, "
                f"{option('num_return')} {options.num_return}; set both to 1"
            )
        _check(prompts)
        endings = Endings(options, self.eos_token_ids, self.decode)
        strategy = self._strategy(options, endings, len(prompts), prompts[0].device, on_token, num_top)
        return Job(prompts, strategy, options.max_new_tokens, partial(self.explained, prompts=prompts))

    @torch.inference_mode()
    def score(self, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability of each answer (token ids) after its prompt ``float[T_i, D]``, as the model gives it.

        An end token counts only where the answer has it. An empty answer scores 0. Raises NotFiniteError where the
        model's scores are NaN or infinite.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts, but {len(answers)} answers; give each answer its prompt")
        if not prompts:
            return []
        _check(prompts)
        with threads.at_most(self._num_threads):
            return self._scores(prompts, answers)

    def _scores(self, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[float]:
        # Longest answer first, so that the rows which are over are the last ones.
        order = sorted(range(len(answers)), key=lambda number: len(answers[number]), reverse=True)
        longest = len(answers[order[0]])
        logits_RV, state = self.language.prefill(*pad_rows([prompts[number] for number in order]), longest)
        total_R = torch.zeros(len(order), dtype=torch.float32, device=logits_RV.device)
        for place in range(longest):
            tokens = [answers[number][place] for number in order if len(answers[number]) > place]
            tokens_R = torch.tensor(tokens, dtype=torch.long, device=logits_RV.device)
            if len(tokens) < len(logits_RV):
                state.select(torch.arange(len(tokens), device=logits_RV.device))
                logits_RV = logits_RV[: len(tokens)]
            total_R[: len(tokens)] += log_probs_of(logits_RV, tokens_R)
            if place + 1 < longest:
                logits_RV = self.language.step(tokens_R, state)
        scores = total_R.tolist()
        try:
            soundness.check(scores)
        except NotFiniteError as error:
            raise self.explained(error, prompts) from None
        score_of = dict(zip(order, scores, strict=True))
        return [score_of[number] for number in range(len(answers))]

    def explained(self, error: Exception, prompts: Sequence[Tensor]) -> Exception:
        """An error that ended an answer to prompts; with the likely cause, if it is that there were no numbers."""
        if not isinstance(error, NotFiniteError):
            return error
        why = self._damage()
        if why is None and prompts[0].dtype != torch.float16 and not all(map(is_finite, prompts)):
            why = "what the language model was given to read is, such as an encoded image; encode the picture again"
        return NotFiniteError(f"{error}: {why or overflow(prompts[0].dtype)}")

    def _strategy(
        self,
        options: GenerateOptions,
        endings: Endings,
        num_prompts: int,
        device: torch.device,
        on_token: OnToken | None,
        num_top: int,
    ) -> Strategy:
        filters = build_filters(
            options, eos_token_ids=self.eos_token_ids, suppress_token_ids=self.suppress_token_ids, device=device
        )
        if options.num_beams > 1:
            return BeamSearch(options, num_prompts=num_prompts, filters=filters, endings=endings, device=device)
        return RowByRow(
            options,
            num_prompts=num_prompts,
            filters=filters,
            suppress_token_ids=self.suppress_token_ids,
            endings=endings,
            on_token=on_token,
            num_top=num_top,
        )


def _check(prompts: Sequence[Tensor]) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; a prompt has one vector or more")
