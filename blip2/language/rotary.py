"""Positions that turn queries and keys (Su et al., 2021), and what a layer's attention is told of its tokens.

B rows, T tokens of this call, S tokens so far, H heads, R turned numbers of a head.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from blip2.config import Rotary


class Turn(NamedTuple):
    """Cosine and sine of each token's angles, ``float[B, 1, T, R]``; the sines of the first half are negative."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        """Number i of a head and number i + R / 2 are a point in the plane, which is turned."""
        size = self.cos.shape[-1]
        turned, rest = x_BHTD[..., :size], x_BHTD[..., size:]
        turned = turned * self.cos + turned.roll(size // 2, -1) * self.sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """By how much each next token turns further, in radians: ``float32[R / 2]``."""
    with torch.inference_mode(False):  # for who trains next
        exponents = torch.arange(0, rotary.size, 2, dtype=torch.float32) / rotary.size
        plain = 1 / rotary.base**exponents
        return _stretched(plain, rotary).to(device)


remembered_frequencies = cache(frequencies)


def _stretched(plain: Tensor, rotary: Rotary) -> Tensor:
    factor, length = rotary.factor, rotary.original_length
    if rotary.scaling == "linear":
        return plain / factor
    if rotary.scaling == "longrope":
        return plain / torch.tensor(rotary.factors)
    if rotary.scaling == "llama3":  # by how often a number turns within the original length
        share = (length * plain / (2 * math.pi) - rotary.slow) / (rotary.fast - rotary.slow)
    elif rotary.scaling == "yarn":  # (Peng et al., 2023): by a ramp over the numbers
        places = [
            rotary.size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))
            for turns in (rotary.fast, rotary.slow)
        ]
        first, last = (math.floor(places[0]), math.ceil(places[1])) if rotary.is_rounded else places
        first, last = max(first, 0), min(last, rotary.size - 1)
        share = 1 - (torch.arange(len(plain)) - first) / (last - first if last != first else 0.001)
    else:
        return plain
    share = share.clamp(0, 1)
    return (1 - share) * plain / factor + share * plain


def turns(rotary: Rotary, positions_BT: Tensor, dtype: torch.dtype) -> Turn:
    """For tokens at these positions."""
    # Tensors of another kind (without values, or traced) are nobody else's.
    find = remembered_frequencies if type(positions_BT) is Tensor else frequencies
    angles_BTR = positions_BT[..., None].float() * find(rotary, positions_BT.device)
    cos, sin = angles_BTR.cos() * rotary.amplitude, angles_BTR.sin() * rotary.amplitude
    return Turn(*(torch.cat(halves, -1)[:, None].to(dtype) for halves in ((cos, cos), (-sin, sin))))


class View(NamedTuple):
    """What a layer's attention needs to know of the tokens: who sees whom (None: all those before), and where they
    are (None: it is not told)."""

    mask: Tensor | None
    turn: Turn | None
