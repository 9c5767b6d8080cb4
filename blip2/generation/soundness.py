"""Answers end with an error where there is no number to choose a token by, and not with whatever token comes first.

A row's log-probability, which comes to the CPU with each token anyway, carries what is wrong: NaN where any logit was
NaN or infinite, infinity where every token was ruled out. So the check costs no other wait for a GPU.

R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from blip2.errors import NotFiniteError, OptionError, option


def poisoned(values: Tensor, log_prob_RV: Tensor) -> Tensor:
    """Values of rows, ``float[R]`` in any shape; NaN where a row's log-probabilities tell of bad logits.

    Those of NaN or infinity make the whole row NaN, minus infinity only its own place.
    """
    return torch.add(values, log_prob_RV.amin(-1).view_as(values), alpha=0)


def check(log_probs: Iterable[float]) -> None:
    """Raises NotFiniteError for a row of bad logits, OptionError for one with no token left."""
    for log_prob in log_probs:
        if math.isnan(log_prob):
            raise NotFiniteError("the scores of the next token are NaN or infinite")
        if log_prob == math.inf:
            raise nothing_left()


def nothing_left() -> OptionError:
    return OptionError(
        f"every token is ruled out, so that no answer can go on; lower {option('no_repeat_ngram_size')} or "
        f"{option('min_new_tokens')}, or rule out fewer tokens"
    )
