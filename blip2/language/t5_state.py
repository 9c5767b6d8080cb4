"""The decoding state of a T5.

B rows, P prompt tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.layers import KVCache, fixed_like, rounded_up, settle


class Encoded(NamedTuple):
    """An encoded prompt: keys and values of each decoder layer, and the mask of real tokens."""

    keys_values: list[tuple[Tensor, Tensor]]
    mask_B11P: Tensor


class T5State:
    """The decoding state: the encoded prompt and the decoder's cache."""

    def __init__(self, encoded: Encoded, cache: KVCache) -> None:
        self.encoded = encoded
        self.cache = cache

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row that is named twice is copied."""
        keys_values = [
            (key[rows_N.to(key.device)], value[rows_N.to(value.device)]) for key, value in self.encoded.keys_values
        ]
        self.encoded = Encoded(keys_values, self.encoded.mask_B11P[rows_N])
        self.cache.select(rows_N)

    def forget(self) -> None:
        """Clear the memory of removed rows."""
        self.cache.forget()

    def join(self, other: T5State) -> None:
        """Append the rows of another state; shorter prompts are padded and masked."""
        own, their = self.encoded.mask_B11P, other.encoded.mask_B11P
        longest = max(own.shape[-1], their.shape[-1])
        keys_values = [
            (_joined(key, their_key, longest), _joined(value, their_value, longest))
            for (key, value), (their_key, their_value) in zip(
                self.encoded.keys_values, other.encoded.keys_values, strict=True
            )
        ]
        mask_B11P = torch.cat([F.pad(mask, (0, longest - mask.shape[-1])) for mask in (own, their)])
        self.encoded = Encoded(keys_values, mask_B11P)
        self.cache.join(other.cache)

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @property
    def num_bytes(self) -> int:
        """See `KVCache.num_bytes`."""
        return self.cache.num_bytes + sum(key.nbytes + value.nbytes for key, value in self.encoded.keys_values)

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        """See `KVCache.fixed_sizes`."""
        return *self.cache.fixed_sizes, rounded_up(self.encoded.mask_B11P.shape[-1])

    def fixed(self) -> T5State:
        """See `KVCache.fixed`."""
        rows, _, prompt = self.fixed_sizes
        keys_values = [
            (fixed_like(key, rows, prompt), fixed_like(value, rows, prompt)) for key, value in self.encoded.keys_values
        ]
        mask_B11P = self.encoded.mask_B11P.new_zeros(rows, 1, 1, prompt)
        return T5State(Encoded(keys_values, mask_B11P), self.cache.fixed())

    def settle(self, home: T5State) -> None:
        """See `KVCache.settle`."""
        rows, prompt = self.encoded.mask_B11P.shape[0], self.encoded.mask_B11P.shape[-1]
        keys, values = map(list, zip(*self.encoded.keys_values, strict=True))
        their_keys, their_values = map(list, zip(*home.encoded.keys_values, strict=True))
        settle(keys, their_keys, prompt)
        settle(values, their_values, prompt)
        mask_B11P = self.encoded.mask_B11P.clone()
        home.encoded.mask_B11P.zero_()[:rows, ..., :prompt] = mask_B11P
        self.encoded = Encoded([*zip(keys, values, strict=True)], home.encoded.mask_B11P[:rows])
        self.cache.settle(home.cache)

    def is_view_of(self, home: T5State) -> bool:
        return self.cache.is_view_of(home.cache)

    def count_step(self) -> None:
        """See `KVCache.count_step`."""
        self.cache.count_step()


def _joined(first_BHPD: Tensor, second_BHPD: Tensor, longest: int) -> Tensor:
    """The rows of both, with space for ``longest`` tokens."""
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in (first_BHPD, second_BHPD)])
