"""Rotary position embedding (Su et al., 2021), and the view of the tokens for a layer's attention.

B rows, T tokens of this call, S tokens so far, H heads, R rotated dimensions of a head.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from blip2.config import Rotary


class Turn(NamedTuple):
    """Cosine and sine of each token's angles, ``float[B, 1, T, R]``; the sines of the first half are negated."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        """Dimensions i and i + R / 2 of a head are the coordinates of a point that is rotated."""
        size = self.cos.shape[-1]
        turned, rest = x_BHTD[..., :size], x_BHTD[..., size:]
        turned = turned * self.cos + turned.roll(size // 2, -1) * self.sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """Angle between successive tokens, in radians: ``float32[R / 2]``."""
    with torch.inference_mode(False):  # usable in later training
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
    if rotary.scaling == "llama3":  # by the number of rotations within the original length
        share = (length * plain / (2 * math.pi) - rotary.slow) / (rotary.fast - rotary.slow)
    elif rotary.scaling == "yarn":  # (Peng et al., 2023): by a ramp over the dimensions
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
    """The rotation for tokens at these positions."""
    # Tensors of other types (meta or traced) must not be cached.
    find = remembered_frequencies if type(positions_BT) is Tensor else frequencies
    angles_BTR = positions_BT[..., None].float() * find(rotary, positions_BT.device)
    cos, sin = angles_BTR.cos() * rotary.amplitude, angles_BTR.sin() * rotary.amplitude
    return Turn(*(torch.cat(halves, -1)[:, None].to(dtype) for halves in ((cos, cos), (-sin, sin))))


class View(NamedTuple):
    """What a layer's attention needs to know of the tokens: the mask (None: causal), and the rotary embedding (None:
    there is none)."""

    mask: Tensor | None
    turn: Turn | None
