"""The interface of decoding: prompts in, answers out.

A prompt is a sequence of vectors (query tokens of an image or embedded tokens), an answer a list of token ids. This
package knows nothing of images or, except for stop strings, of text.
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
    """Run a generator to its end; returns its value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: Value = end.value
            return value


class Engine:
    """Decodes with one language model.

    All prompts of a call run as one batch, whose size is up to the caller. A server keeps one `Batch` running, which
    requests join and leave (`job`). An answer does not depend on the rest of the batch.

    - ``eos_token_ids``: any of these ends an answer.
    - ``suppress_token_ids``: never generated: the image token, vocabulary rows without text.
    - ``decode``: token ids to text; needed for stop strings only.
    - ``damage``: describes weights that are NaN or infinite, or None; called only if logits are.
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
        self._num_threads = threads.num_useful(language)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tensor], options: GenerateOptions | None = None, *, on_token: OnToken | None = None
    ) -> list[list[Hypothesis]]:
        """For each prompt ``float[T_i, D]`` its ``num_return`` answers, best first.

        ``on_token(prompt number, token)`` is called for each token as soon as it is final. Raises `OptionError` for
        options that cannot be combined: stop strings without ``decode``, ``on_token`` with more than one running answer
        to a prompt; or if every token is ruled out. Raises `NotFiniteError` if the model's logits are NaN or infinite.
        """
        with threads.at_most(self._num_threads):
            return finished(self.generating(prompts, options, on_token=on_token))

    def generating(
        self, prompts: Sequence[Tensor], options: GenerateOptions | None = None, *, on_token: OnToken | None = None
    ) -> Generator[None, None, list[list[Hypothesis]]]:
        """As `generate`, as a generator that yields between tokens and returns the answers."""
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
        """As `generate`, as a job for a running batch of this engine's language model (`Batch.add`).

        ``on_token`` is called during a step of the batch; an exception in it ends only this job. ``num_top``: number of
        most likely tokens to record at each place (`Hypothesis.top`); not with beams.
        """
        if on_token is not None and (options.num_beams > 1 or options.num_return > 1):
            raise OptionError(
                f"on_token needs a single answer to a prompt, but {option('num_beams')} is {options.num_beams}, "
                f"{option('num_return')} {options.num_return}; set both to 1"
            )
        _check(prompts)
        endings = Endings(options, self.eos_token_ids, self.decode)
        strategy = self._strategy(options, endings, len(prompts), prompts[0].device, on_token, num_top)
        return Job(prompts, strategy, options.max_new_tokens, partial(self.explained, prompts=prompts))

    @torch.inference_mode()
    def score(self, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability of each answer (token ids) after its prompt ``float[T_i, D]``, from the model.

        An end token counts only if the answer contains it. An empty answer scores 0. Raises NotFiniteError if the
        model's logits are NaN or infinite.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts, but {len(answers)} answers; give one answer for each prompt")
        if not prompts:
            return []
        _check(prompts)
        with threads.at_most(self._num_threads):
            return self._scores(prompts, answers)

    def _scores(self, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> list[float]:
        # Longest answer first, so that rows end in order from the last.
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
        """The error that ended an answer to prompts; for NaN or infinite logits with the likely cause."""
        if not isinstance(error, NotFiniteError):
            return error
        why = self._damage()
        if why is None and prompts[0].dtype != torch.float16 and not all(map(is_finite, prompts)):
            why = "its input has such values, for example an encoded image; encode the image again"
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
            raise ValueError(f"prompt {number} is empty; a prompt needs at least one vector")
