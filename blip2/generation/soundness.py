"""Detects NaN and infinite logits, so that decoding ends with an error instead of an arbitrary token.

A row's log-probability, which is copied to the CPU with each token anyway, carries the information: NaN if any logit
was NaN or infinite, infinity if every token was ruled out. So the check needs no additional GPU synchronisation.

R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from blip2.errors import NotFiniteError, OptionError, option


def nan_if_invalid(values: Tensor, log_prob_RV: Tensor) -> Tensor:
    """Values of rows, ``float[R]`` in any shape; NaN if a row's log-probabilities show invalid logits.

    A logit of NaN or infinity makes the whole row NaN; minus infinity affects only its own place.
    """
    return torch.add(values, log_prob_RV.amin(-1).view_as(values), alpha=0)


def check(log_probs: Iterable[float]) -> None:
    """Raises NotFiniteError for a row with invalid logits, OptionError for a row without an allowed token."""
    for log_prob in log_probs:
        if math.isnan(log_prob):
            raise NotFiniteError("the scores of the next token are NaN or infinite")
        if log_prob == math.inf:
            raise nothing_left()


def nothing_left() -> OptionError:
    return OptionError(
        f"every token is ruled out, so the answer cannot continue; lower {option('no_repeat_ngram_size')} or "
        f"{option('min_new_tokens')}, or rule out fewer tokens"
    )
