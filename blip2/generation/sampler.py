"""Random sampling in which a row's tokens depend only on its own random numbers.

R rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.generation.options import GenerateOptions


class Sampler:
    """Samples tokens; every row has its own sequence of random numbers, made in advance.

    A draw is a number u in [0, 1), and the token is the one where the cumulative probability exceeds u.
    """

    def __init__(self, options: GenerateOptions, num_prompts: int) -> None:
        self._draws_RT = torch.stack(
            [
                torch.rand(options.max_new_tokens, dtype=torch.float64, generator=_generator(options.seed, sample))
                for _ in range(num_prompts)
                for sample in range(options.num_return)
            ]
        )

    def __call__(self, scores_RV: Tensor, rows: list[int], step: int) -> Tensor:
        summed_RV = scores_RV.softmax(-1).cumsum(-1, dtype=torch.float64)
        draw_R1 = self._draws_RT[rows, step].to(scores_RV.device)[:, None] * summed_RV[:, -1:]
        return torch.searchsorted(summed_RV, draw_R1, right=True)[:, 0].clamp(max=scores_RV.shape[1] - 1)


def _generator(seed: int | None, sample: int) -> torch.Generator:
    """The random numbers of the n-th sample of any prompt; without a seed, from torch's global generator."""
    if seed is None:
        return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    # An odd constant (2**64 / golden ratio) separates the samples of one seed from those of the next seeds.
    return torch.Generator().manual_seed((seed + sample * 0x9E3779B97F4A7C15) % 2**64)
