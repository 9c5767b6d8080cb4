"""What every transformer here shares: attention, the key-value cache, and freezing.

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
    """Within, every `attend` adds its weights ``float[B, H, T, S]`` to the list; slower, and of the same value."""
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
    """Scaled dot-product attention, heads joined again.

    ``mask`` is either boolean (True: may attend) or a float bias that is added to the scores; it broadcasts
    to ``[B, H, T, S]``. ``scale`` is 1/sqrt(D) unless given. ``cap``: scores s become cap * tanh(s / cap). There may be
    fewer heads of keys and values, for as many heads of queries each. Returns ``float[B, T, H * D]``.
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
            # Where all scores of a query are minus infinity, or NaN of less than 16 keys, torch answers 0.
            query_BH11, key_BH11 = (x.sum((-2, -1), True, dtype=torch.float32) for x in (query_BHTD, key_BHSD))
            nothing_BH11 = ((query_BH11 + key_BH11) * 0).to(out.dtype)
            out = out + nothing_BH11 if out.requires_grad else out.add_(nothing_BH11)  # in place costs little
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
    """The same by matrix products, which on a CPU is faster: backward several times, in bfloat16 (images) twice."""
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
    """Each of K heads of keys and values for as many heads of queries, which stand side by side."""
    rows, num_heads, num_tokens, _ = query_BHTD.shape
    num_groups = key_BKSD.shape[1]
    size = num_heads // num_groups
    if num_tokens > 1 or is_attention_recorded():
        key_BHSD, value_BHSD = (x.repeat_interleave(size, dim=1) for x in (key_BKSD, value_BKSD))
        return attend(query_BHTD, key_BHSD, value_BHSD, mask=mask, **options)
    # While decoding, the cache is not copied: each group is a row, and its keys are every head's.
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

    Every row starts at slot 0 and has its own length, so a row never depends on what else is in the batch:
    positions and masks come from ``lengths_B``. Prompts of mixed length are right-padded inside one call only;
    what the padding wrote lies beyond the row's length, is masked, and is overwritten as the row grows.
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
        """``device``: of the tokens. Each layer's keys and values are where its weights are."""
        shape = (rows, num_heads, capacity, head_size)
        places = [next(layer.parameters()).device for layer in layers]
        self.keys = [torch.zeros(shape, device=place, dtype=dtype) for place in places]
        self.values = [torch.zeros(shape, device=place, dtype=dtype) for place in places]
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.program: Any = None  # see `blip2.language.stepping`
        self._spare: Tensor | None = None  # what `select` copies into next
        self._longest = 0  # of all rows, known without asking the device
        self._is_even = True  # whether all rows are equally long
        self._is_fixed = False  # whether its memory stays where it is, and a step leaves nothing on the host
        self._is_guest = False  # whether its memory is another's

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def positions(self, num_tokens: int) -> Tensor:
        """The slots that the next ``num_tokens`` of each row will take: ``int64[B, T]``."""
        return self.lengths_B[:, None] + torch.arange(num_tokens, device=self.lengths_B.device)

    def mask(self, positions_BT: Tensor) -> Tensor:
        """Who may attend to what: each token to the slots of its row up to its own. ``bool[B, 1, T, S]``."""
        end = self.capacity if self._is_fixed else min(self._longest + positions_BT.shape[1], self.capacity)
        slots_S = torch.arange(end, device=positions_BT.device)
        return (slots_S <= positions_BT[:, :, None])[:, None]

    def write(self, layer: int, key_BHTD: Tensor, value_BHTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values at ``positions_BT``; returns all of the layer's, ``[B, H, S, D]``."""
        num_tokens = key_BHTD.shape[2]
        end = self.capacity if self._is_fixed else self._longest + num_tokens
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens a row, {end} are needed"
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
        """Keys and values of each layer in turn, ``[B, H, capacity, D]``, with room for one more token."""
        assert self._is_fixed or self._longest < self.capacity, f"the cache holds {self.capacity} tokens a row"
        return [part for both in zip(self.keys, self.values, strict=True) for part in both]

    def advance(self, num_tokens_B: Tensor | int, longest: int) -> None:
        """After all layers wrote: each row grew by ``num_tokens_B``, the longest of the call by ``longest``."""
        if self._is_fixed:
            self.lengths_B += num_tokens_B
            return
        if isinstance(num_tokens_B, Tensor):
            self._is_even = self._is_even and bool((num_tokens_B == longest).all())
        self.lengths_B = self.lengths_B + num_tokens_B
        self._longest += longest

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row named twice is copied (a beam that splits)."""
        # A beam search comes here at every step, so no memory is asked for: each tensor is copied into the one before.
        spare: Tensor | None = self._spare
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                if spare is None or self._is_guest or not _has_room(spare, old, len(rows_N)):
                    spare = old.new_empty(len(rows_N), *old.shape[1:])
                    spare[:, :, self._longest :] = 0
                # Slots that no row has reached are not copied; they are read with weight 0, so anything finite will do.
                new = spare.narrow(0, 0, len(rows_N))
                torch.index_select(
                    old.narrow(2, 0, self._longest), 0, rows_N.to(old.device), out=new.narrow(2, 0, self._longest)
                )
                layers[layer], spare = new, old
        self._spare = None if self._is_guest else spare
        self._is_guest = False
        have_left = len(rows_N) < len(self.lengths_B)
        self.lengths_B = self.lengths_B[rows_N]
        if have_left and not self._is_even:  # perhaps the longest; not asked at each step of a beam search
            self._longest = int(self.lengths_B.max())

    def forget(self) -> None:
        """Let go of what rows have left behind that are gone: it may be NaN, which counts even with weight 0."""
        self._spare = None

    def join(self, other: KVCache) -> None:
        """Take in the rows of another cache, after those here."""
        capacity = max(self.capacity, other.capacity)
        for own, their in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (here, there) in enumerate(zip(own, their, strict=True)):
                own[layer] = torch.cat([_widened(here, capacity), _widened(there, capacity)])
        self._spare, self._is_guest = None, False
        self.lengths_B = torch.cat([self.lengths_B, other.lengths_B])
        self._is_even = self._is_even and other._is_even and self._longest == other._longest
        self._longest = max(self._longest, other._longest)

    # ---- for steps that are recorded (`blip2.generation.replay`) ----

    @property
    def device(self) -> torch.device:
        """Of the tokens."""
        return self.lengths_B.device

    @property
    def num_bytes(self) -> int:
        """Of a fixed one, about."""
        return sum(part.nbytes for part in (*self.keys, *self.values)) * self.room[0] // len(self.lengths_B)

    @property
    def room(self) -> tuple[int, ...]:
        """Rows and slots, rounded up: caches of equal room fit into the same fixed one."""
        return 1 << (len(self.lengths_B) - 1).bit_length(), rounded_up(self.capacity)

    def fixed(self) -> KVCache:
        """An empty cache of this one's room. A step changes its tensors in place and nothing else: each row is written
        at its length, and sees all slots that it has filled."""
        new = copy(self)
        new.keys, new.values = ([fixed_like(old, *self.room) for old in part] for part in (self.keys, self.values))
        new.lengths_B = self.lengths_B.new_zeros(self.room[0])
        new._is_fixed = True
        return new

    def settle(self, home: KVCache) -> None:
        """Move into the first rows of a fixed cache. This one is a part of it then, until rows are chosen or join."""
        rows = len(self.lengths_B)
        for own, their in ((self.keys, home.keys), (self.values, home.values)):
            settle(own, their, self._longest)
        self._spare, self._is_guest = None, True
        lengths_B = self.lengths_B.clone()
        home.lengths_B.zero_()[:rows] = lengths_B
        self.lengths_B = home.lengths_B[:rows]

    def lives_in(self, home: KVCache) -> bool:
        return _is_part(self.keys[0], home.keys[0]) and _is_part(self.lengths_B, home.lengths_B)

    def count_step(self) -> None:
        """A recorded step has appended a token to each row of the fixed cache in which this one lives."""
        self._longest += 1


ROOM = 32


def rounded_up(number: int) -> int:
    """To the next multiple of `ROOM`."""
    return -(-number // ROOM) * ROOM


def fixed_like(old_BHSD: Tensor, rows: int, slots: int) -> Tensor:
    return old_BHSD.new_zeros(rows, old_BHSD.shape[1], slots, old_BHSD.shape[3])


def settle(layers: list[Tensor], homes: list[Tensor], end: int) -> None:
    """Copy the first ``end`` slots of each layer ``[B, H, S, D]`` to its home, which has as many rows and slots or
    more, and put the part of the home in the layer's place. What others have left there goes: NaN would reach us."""
    if _is_part(layers[0], homes[0]):
        return
    rows = len(layers[0])
    torch._foreach_zero_(homes)
    torch._foreach_copy_([home[:rows, :, :end] for home in homes], [layer[:, :, :end] for layer in layers])
    layers[:] = [home[:rows] for home in homes]


def _is_part(tensor: Tensor, home: Tensor) -> bool:
    return tensor.data_ptr() == home.data_ptr()


def _has_room(spare: Tensor, like: Tensor, num_rows: int) -> bool:
    """For so many rows of the same kind."""
    return len(spare) >= num_rows and spare.shape[1:] == like.shape[1:] and spare.device == like.device


def _widened(values_BHSD: Tensor, capacity: int) -> Tensor:
    """With room for so many tokens."""
    return F.pad(values_BHSD, (0, 0, 0, capacity - values_BHSD.shape[2]))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within, operations on this kind of device compute in the precision of their tensors."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The precision that autocast asks for on this kind of device; None where it does not."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode for good, no gradients: what BLIP-2 does with the image encoder and the language model."""
    module.requires_grad_(False)
    return module.eval()
