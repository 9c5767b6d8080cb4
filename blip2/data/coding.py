"""Storage of features on disk: half precision, or one byte for each number with a scale for each token.

B images, P patches and the tokens before them, D width, R bytes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

FeaturesDtype = Literal["fp16", "int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The code of a token's largest number; 448 is the maximum of e4m3 (Micikevicius et al. 2022, table 1)."""
SCALE_BYTES = 4


class Coding(NamedTuple):
    """``fp16``: float16[1 + P, D]. ``int8`` and ``fp8``: float32[1 + P], the scale of each token, then a byte for each
    number, int8[1 + P, D] or e4m3[1 + P, D]. A number is its code times the scale of its token."""

    dtype: FeaturesDtype
    num_tokens: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        per_token = 2 * self.width if self.dtype == "fp16" else SCALE_BYTES + self.width
        return self.num_tokens * per_token

    def encode(self, features_BPD: Tensor) -> Tensor:
        """``float[B, 1 + P, D]`` on the CPU to ``uint8[B, R]``. An image that is all NaN stays NaN."""
        if self.dtype == "fp16":
            return features_BPD.half().contiguous().view(torch.uint8).flatten(1)
        largest, features_BPD = LARGEST[self.dtype], features_BPD.float()
        scale_BP1 = features_BPD.abs().amax(-1, keepdim=True) / largest
        # For a token that is all zero any scale works.
        scale_BP1 = torch.where(scale_BP1 == 0, torch.ones_like(scale_BP1), scale_BP1)
        code_BPD = (features_BPD / scale_BP1).nan_to_num().clamp(-largest, largest)
        code_BPD = code_BPD.round().to(torch.int8) if self.dtype == "int8" else code_BPD.to(torch.float8_e4m3fn)
        return torch.cat([scale_BP1.flatten(1).view(torch.uint8), code_BPD.view(torch.uint8).flatten(1)], 1)

    def decode(self, rows_BR: Tensor) -> Tensor:
        """``uint8[B, R]`` to ``float16[B, 1 + P, D]``."""
        shape = len(rows_BR), self.num_tokens, self.width
        if self.dtype == "fp16":
            return rows_BR.view(torch.float16).view(shape)
        scale_bytes = SCALE_BYTES * self.num_tokens
        scale_BP = rows_BR[:, :scale_bytes].contiguous().view(torch.float32)
        kind = torch.int8 if self.dtype == "int8" else torch.float8_e4m3fn
        code_BPD = rows_BR[:, scale_bytes:].contiguous().view(kind).view(shape)
        return (code_BPD.float() * scale_BP[..., None]).half()
