"""Shared by all families of ``language_model``: ``past_key_values``, losses, masks.

B rows, T tokens of this call, S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.compat.parts import Part
from blip2.errors import OptionError
from blip2.language import Language

NOT_A_LABEL = -100


class Past:
    """``past_key_values``: keys and values of earlier tokens. It grows when it is passed again."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def write(self, layer: int, key_BHTD: Tensor, value_BHTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.write`."""
        if layer < len(self.keys):
            key_BHTD = self.keys[layer] = torch.cat([self.keys[layer], key_BHTD], dim=2)
            value_BHTD = self.values[layer] = torch.cat([self.values[layer], value_BHTD], dim=2)
        else:
            self.keys.append(key_BHTD)
            self.values.append(value_BHTD)
        return key_BHTD, value_BHTD

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.keys[layer_idx].shape[2] if self.keys else 0

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(self.keys, self.values, strict=True)))

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]


def loss_of(logits_BTV: Tensor, labels_BT: Tensor, number: Tensor | int | None = None) -> Tensor:
    """Cross-entropy: the mean over the labels, or the sum divided by ``number``."""
    logits = logits_BTV.flatten(0, 1).float()
    labels = labels_BT.to(logits.device).flatten()
    if number is None:
        return F.cross_entropy(logits, labels, ignore_index=NOT_A_LABEL)
    total = F.cross_entropy(logits, labels, ignore_index=NOT_A_LABEL, reduction="sum")
    return total / (number.to(total.device) if isinstance(number, Tensor) else number)


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, number: Tensor | int | None = None) -> Tensor:
    """The loss in which each token's logits predict the label of the next token."""
    return loss_of(logits_BTV[:, :-1], labels_BT[:, 1:], number)


class LanguagePart(Part):
    """What all families share."""

    lm_head: nn.Module

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, name: str = "inputs_embeds") -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise OptionError(f"give either token ids or {name}, not both or neither")
        core = cast("Language", self.core)
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds.to(self.device, core.dtype)
        return core.embed(input_ids.to(self.device))

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits ``float[..., V]`` from the head as programs see it."""
        head = self.lm_head
        weight = getattr(head, "weight", None)
        if isinstance(head, nn.Linear) and isinstance(weight, Tensor):
            return head(hidden.to(weight.dtype))
        return cast("Language", self.core).logits(hidden)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Generate after a text, int[B, T], or vectors float[B, S, D]; options and result as for the whole model.

        For vectors, only the new tokens are returned (and a T5's start token).
        """
        if "writer" not in self.__dict__:
            raise OptionError("a part of a language model cannot generate; use model.language_model")
        vectors_BSD = self.embedded(input_ids, inputs_embeds)
        ids_BT = vectors_BSD.new_empty(len(vectors_BSD), 0, dtype=torch.long) if input_ids is None else input_ids
        is_real_BS = checked_mask(attention_mask, tuple(vectors_BSD.shape[:2]), vectors_BSD.device)
        return self.__dict__["writer"].write_on(vectors_BSD, is_real_BS, ids_BT.to(vectors_BSD.device), **options)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.lm_head = head

    def get_input_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.embed_tokens)

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        raise OptionError("the parts of a language model share one token table; set it on language_model")

    def get_encoder(self) -> nn.Module:
        raise OptionError(f"{type(self).__name__} has no encoder; only a whole T5 has one")

    def get_decoder(self) -> nn.Module:
        return self


def causal_mask(is_real_BS: Tensor, num_tokens: int) -> Tensor:
    """``bool[B, 1, T, S]`` for the last T tokens: each attends to real tokens up to itself; one without any attends to
    itself."""
    length = is_real_BS.shape[1]
    own_SS = torch.eye(length, dtype=torch.bool, device=is_real_BS.device)
    mask_BSS = own_SS.new_ones(length, length).tril() & is_real_BS.bool()[:, None]
    mask_BSS = mask_BSS | (own_SS & ~mask_BSS.any(dim=-1, keepdim=True))
    return mask_BSS[:, None, length - num_tokens :]


def checked_mask(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tokens are real, ``bool[B, S]``; all, without a mask."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if tuple(mask.shape) != shape:
        raise OptionError(f"the attention mask is {list(mask.shape)}, the tokens so far are {list(shape)}")
    return mask.to(device).bool()
