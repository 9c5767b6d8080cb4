"""Shared parts of all transformers: attention, the key-value cache, and freezing.

B batch rows, H heads, T new tokens, S all tokens so far (or keys), D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2 import native
from blip2.dropout import drop, is_by_rows

_SEEN: ContextVar[list[Tensor] | None] = ContextVar("attention weights", default=None)


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Inside, every `attend` appends its weights ``float[B, H, T, S]`` to the list; slower, with the same results."""
    seen: list[Tensor] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def is_attention_recorded() -> bool:
    return _SEEN.get() is not None


def attend(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    cap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with joined heads as output.

    ``mask`` is either boolean (True: may attend) or a float bias that is added to the scores; it broadcasts to ``[B, H,
    T, S]``. ``scale`` defaults to 1/sqrt(D). ``cap``: scores s become cap * tanh(s / cap). There may be fewer heads of
    keys and values than of queries (grouped-query attention). Returns ``float[B, T, H * D]``.
    """
    if key_BHSD.shape[1] != query_BHTD.shape[1]:
        options = {"is_causal": is_causal, "scale": scale, "dropout": dropout, "cap": cap}
        return _attend_in_groups(query_BHTD, key_BHSD, value_BHSD, mask, options)
    if mask is not None and mask.dtype not in (torch.bool, query_BHTD.dtype):
        mask = mask.to(query_BHTD.dtype)
    if (seen := _SEEN.get()) is not None or cap is not None or (dropout and is_by_rows()):
        out = _attend_plainly(query_BHTD, key_BHSD, value_BHSD, mask, is_causal, scale, dropout, seen, cap)
        return out.transpose(1, 2).flatten(2)
    if not dropout and native.can_attend(query_BHTD, key_BHSD, value_BHSD, mask):
        scale = query_BHTD.shape[-1] ** -0.5 if scale is None else scale
        return native.attend(query_BHTD, key_BHSD, value_BHSD, mask, scale)
    is_half = query_BHTD.dtype == torch.bfloat16 and mask is None and not is_causal
    if query_BHTD.device.type == "cpu" and (query_BHTD.requires_grad or is_half):
        out = _attend_plainly(query_BHTD, key_BHSD, value_BHSD, mask, is_causal, scale, dropout)
    else:
        out = F.scaled_dot_product_attention(
            query_BHTD, key_BHSD, value_BHSD, attn_mask=mask, is_causal=is_causal, scale=scale, dropout_p=dropout
        )
        if out.device.type == "cpu":
            # If all scores of a query are minus infinity, or NaN with less than 16 keys, torch returns 0.
            query_BH11, key_BH11 = (x.sum((-2, -1), True, dtype=torch.float32) for x in (query_BHTD, key_BHSD))
            nothing_BH11 = ((query_BH11 + key_BH11) * 0).to(out.dtype)
            out = out + nothing_BH11 if out.requires_grad else out.add_(nothing_BH11)  # in place is cheap
    return out.transpose(1, 2).flatten(2)


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout: float,
    seen: list[Tensor] | None = None,
    cap: float | None = None,
) -> Tensor:
    """The same by matrix products, faster on a CPU: several times in the backward pass, twice in bfloat16 (images)."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if is_causal:
        length = scores.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = drop(scores.softmax(-1), dropout, dropout > 0)
    if seen is not None:
        seen.append(weights)
    return weights @ value


def _attend_in_groups(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Grouped-query attention: each of K heads of keys and values serves a group of adjacent query heads."""
    rows, num_heads, num_tokens, _ = query_BHTD.shape
    num_groups = key_BKSD.shape[1]
    size = num_heads // num_groups
    if num_tokens > 1 or is_attention_recorded():
        key_BHSD, value_BHSD = (x.repeat_interleave(size, dim=1) for x in (key_BKSD, value_BKSD))
        return attend(query_BHTD, key_BHSD, value_BHSD, mask=mask, **options)
    # In decoding the cache is not copied: each group is a row whose heads share the keys.
    keys, values = (x.flatten(0, 1)[:, None].expand(-1, size, -1, -1) for x in (key_BKSD, value_BKSD))
    if mask is not None and len(mask) > 1:
        mask = mask.repeat_interleave(num_groups, dim=0)
    out = attend(query_BHTD.reshape(rows * num_groups, size, 1, -1), keys, values, mask=mask, **options)
    return out.view(rows, 1, -1)


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """``[B, T, H * D] -> [B, H, T, D]``."""
    return x_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def split_parts(x_BTD: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of one product, side by side: ``[B, T, parts * H * D]`` to ``[B, H, T, D]`` each."""
    return x_BTD.unflatten(-1, (num_parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class KVCache:
    """Keys and values of all layers; a row is one sequence.

    Every row starts at slot 0 and has its own length, so rows do not depend on each other: positions and masks follow
    from ``lengths_B``. Prompts of different lengths are right-padded within one call only. Padding is written beyond
    the row's length, masked, and overwritten as the row grows.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        rows: int,
        num_heads: int,
        capacity: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``device``: that of the tokens. Keys and values of a layer are on the device of its weights."""
        shape = (rows, num_heads, capacity, head_size)
        places = [next(layer.parameters()).device for layer in layers]
        self.keys = [torch.zeros(shape, device=place, dtype=dtype) for place in places]
        self.values = [torch.zeros(shape, device=place, dtype=dtype) for place in places]
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.program: Any = None  # see `blip2.language.stepping`
        self._spare: Tensor | None = None  # buffer for the next `select`
        self._longest = 0  # over all rows, known without asking the device
        self._is_even = True  # whether all rows have the same length
        self._is_fixed = False  # whether its memory never moves, so that steps can be recorded
        self._is_view = False  # whether its memory belongs to another cache

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def positions(self, num_tokens: int) -> Tensor:
        """The slots for the next ``num_tokens`` of each row: ``int64[B, T]``."""
        return self.lengths_B[:, None] + torch.arange(num_tokens, device=self.lengths_B.device)

    def mask(self, positions_BT: Tensor) -> Tensor:
        """The causal mask: each token may attend to the slots of its row up to its own. ``bool[B, 1, T, S]``."""
        end = self.capacity if self._is_fixed else min(self._longest + positions_BT.shape[1], self.capacity)
        slots_S = torch.arange(end, device=positions_BT.device)
        return (slots_S <= positions_BT[:, :, None])[:, None]

    def write(self, layer: int, key_BHTD: Tensor, value_BHTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values at ``positions_BT``; returns all of the layer, ``[B, H, S, D]``."""
        num_tokens = key_BHTD.shape[2]
        end = self.capacity if self._is_fixed else self._longest + num_tokens
        assert end <= self.capacity, f"the cache has {self.capacity} slots a row, but {end} are needed"
        keys, values = self.keys[layer], self.values[layer]
        if self._is_even and not self._is_fixed:
            keys.narrow(2, self._longest, num_tokens).copy_(key_BHTD)
            values.narrow(2, self._longest, num_tokens).copy_(value_BHTD)
        else:
            rows_B1 = torch.arange(len(keys), device=keys.device)[:, None]
            keys[rows_B1, :, positions_BT] = key_BHTD.transpose(1, 2).to(keys.dtype)
            values[rows_B1, :, positions_BT] = value_BHTD.transpose(1, 2).to(values.dtype)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def planes(self) -> list[Tensor]:
        """Keys and values of each layer in turn, ``[B, H, capacity, D]``, with space for one more token."""
        assert self._is_fixed or self._longest < self.capacity, f"the cache has only {self.capacity} slots a row"
        return [part for both in zip(self.keys, self.values, strict=True) for part in both]

    def advance(self, num_tokens_B: Tensor | int, longest: int) -> None:
        """After all layers have written: each row grows by ``num_tokens_B``, at most by ``longest``."""
        if self._is_fixed:
            self.lengths_B += num_tokens_B
            return
        if isinstance(num_tokens_B, Tensor):
            self._is_even = self._is_even and bool((num_tokens_B == longest).all())
        self.lengths_B = self.lengths_B + num_tokens_B
        self._longest += longest

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row that is named twice is copied (a beam that splits)."""
        # Beam search calls this at every step, so no memory is allocated: tensors are copied into spare ones.
        spare: Tensor | None = self._spare
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                if spare is None or self._is_view or not _has_space(spare, old, len(rows_N)):
                    spare = old.new_empty(len(rows_N), *old.shape[1:])
                    spare[:, :, self._longest :] = 0
                # Slots beyond all rows are not copied; they are read with weight 0, so any finite value will do.
                new = spare.narrow(0, 0, len(rows_N))
                torch.index_select(
                    old.narrow(2, 0, self._longest), 0, rows_N.to(old.device), out=new.narrow(2, 0, self._longest)
                )
                layers[layer], spare = new, old
        self._spare = None if self._is_view else spare
        self._is_view = False
        have_left = len(rows_N) < len(self.lengths_B)
        self.lengths_B = self.lengths_B[rows_N]
        if have_left and not self._is_even:  # perhaps the longest; not computed at each step of beam search
            self._longest = int(self.lengths_B.max())

    def forget(self) -> None:
        """Clear the slots of removed rows: they may be NaN, which has an effect even with weight 0."""
        self._spare = None

    def join(self, other: KVCache) -> None:
        """Append the rows of another cache."""
        capacity = max(self.capacity, other.capacity)
        for own, their in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (here, there) in enumerate(zip(own, their, strict=True)):
                own[layer] = torch.cat([_widened(here, capacity), _widened(there, capacity)])
        self._spare, self._is_view = None, False
        self.lengths_B = torch.cat([self.lengths_B, other.lengths_B])
        self._is_even = self._is_even and other._is_even and self._longest == other._longest
        self._longest = max(self._longest, other._longest)

    # ---- for recorded steps (`blip2.generation.replay`) ----

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.lengths_B.device

    @property
    def num_bytes(self) -> int:
        """Approximate size of a fixed cache."""
        return sum(part.nbytes for part in (*self.keys, *self.values)) * self.fixed_sizes[0] // len(self.lengths_B)

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        """Rows and slots, rounded up: caches with equal values fit into the same fixed one."""
        return 1 << (len(self.lengths_B) - 1).bit_length(), rounded_up(self.capacity)

    def fixed(self) -> KVCache:
        """An empty fixed cache with this one's `fixed_sizes`. A step only changes its tensors in place: each row is
        written at its length and attends to all its filled slots."""
        new = copy(self)
        sizes = self.fixed_sizes
        new.keys, new.values = ([fixed_like(old, *sizes) for old in part] for part in (self.keys, self.values))
        new.lengths_B = self.lengths_B.new_zeros(sizes[0])
        new._is_fixed = True
        return new

    def settle(self, home: KVCache) -> None:
        """Move into the first rows of a fixed cache. This one is then a view of it, until rows are selected or
        joined."""
        rows = len(self.lengths_B)
        for own, their in ((self.keys, home.keys), (self.values, home.values)):
            settle(own, their, self._longest)
        self._spare, self._is_view = None, True
        lengths_B = self.lengths_B.clone()
        home.lengths_B.zero_()[:rows] = lengths_B
        self.lengths_B = home.lengths_B[:rows]

    def is_view_of(self, home: KVCache) -> bool:
        return _is_part(self.keys[0], home.keys[0]) and _is_part(self.lengths_B, home.lengths_B)

    def count_step(self) -> None:
        """Account for a recorded step, which has appended a token to each row of the fixed cache behind this one."""
        self._longest += 1


SLOTS_STEP = 32


def rounded_up(number: int) -> int:
    """Rounded up to a multiple of `ROOM`."""
    return -(-number // SLOTS_STEP) * SLOTS_STEP


def fixed_like(old_BHSD: Tensor, rows: int, slots: int) -> Tensor:
    return old_BHSD.new_zeros(rows, old_BHSD.shape[1], slots, old_BHSD.shape[3])


def settle(layers: list[Tensor], homes: list[Tensor], end: int) -> None:
    """Copy the first ``end`` slots of each layer ``[B, H, S, D]`` to its home, which is at least as large, and replace
    the layer by that part of the home. Old values there are cleared, since NaN would spread."""
    if _is_part(layers[0], homes[0]):
        return
    rows = len(layers[0])
    torch._foreach_zero_(homes)
    torch._foreach_copy_([home[:rows, :, :end] for home in homes], [layer[:, :, :end] for layer in layers])
    layers[:] = [home[:rows] for home in homes]


def _is_part(tensor: Tensor, home: Tensor) -> bool:
    return tensor.data_ptr() == home.data_ptr()


def _has_space(spare: Tensor, like: Tensor, num_rows: int) -> bool:
    """Whether ``spare`` has space for ``num_rows`` rows shaped like ``like``."""
    return len(spare) >= num_rows and spare.shape[1:] == like.shape[1:] and spare.device == like.device


def _widened(values_BHSD: Tensor, capacity: int) -> Tensor:
    """Enlarged to ``capacity`` tokens."""
    return F.pad(values_BHSD, (0, 0, 0, capacity - values_BHSD.shape[2]))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, operations on this device type compute in the dtype of their tensors."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on this device type; None if it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def freeze(module: nn.Module) -> nn.Module:
    """Permanent evaluation mode without gradients, for the image encoder and the language model."""
    module.requires_grad_(False)
    return module.eval()
