"""Rows of ids: special tokens, padding, and the conversion of lists to tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip2.compat.records import BatchFeature
from blip2.errors import OptionError
from blip2.text import Tokenizer

TokenIds = int | Sequence[Any] | np.ndarray | Tensor

PADDINGS = {
    True: "longest", "longest": "longest", False: None, None: None, "do_not_pad": None, "max_length": "max_length"
}  # fmt: skip
TRUNCATIONS = {
    True: True,
    "longest_first": True,
    "only_first": True,
    False: False,
    "do_not_truncate": False,
    None: None,
}


@dataclass(frozen=True)
class Layout:
    """The places of a family's special tokens and padding, and the tokens' names."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    pads_left: bool
    names: Mapping[str, str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Layout:
        """The layout of a tokenizer, recognised by its special tokens."""
        if tokenizer.find("[CLS]") is not None:
            names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
            return cls((tokenizer.token_id("[CLS]"),), (tokenizer.token_id("[SEP]"),), False, names)
        end, pad = tokenizer.find("</s>"), tokenizer.find("<pad>")
        names = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
        if (end, pad) == (1, 0):
            return cls((), (1,), False, names)
        if (end, pad) == (2, 1):
            return cls((2,), (), True, names | {"bos": "</s>", "unk": "</s>"})
        if end == 2 and tokenizer.find("[PAD]") is not None:  # Vicuna
            return cls((2,), (), True, names | {"bos": "</s>", "pad": "[PAD]", "unk": "</s>"})
        return cls(*tokenizer.around(), True, {})


class Row(NamedTuple):
    """A text: its ids, a mask of special tokens, and the characters of each token."""

    ids: list[int]
    is_special: list[int]
    places: list[tuple[int, int]]


def filled(rows: Sequence[Sequence[Any]], width: int, fill: Any, side: str) -> list[list[Any]]:
    """Rows padded on one side to at least ``width``."""
    more = [[fill] * (width - len(row)) for row in rows]
    return [[*some, *row] if side == "left" else [*row, *some] for row, some in zip(rows, more, strict=True)]


def texts_of(text: Any) -> list[str]:
    """One text or several, as a list."""
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else []
    if not texts or not all(isinstance(each, str) for each in texts):
        raise OptionError(
            f"text is {re.sub(' at 0x[0-9a-fA-F]+', '', repr(text))}; give a text, or a list of at least one"
        )
    return texts


def tensors(made: BatchFeature, return_tensors: str | None) -> BatchFeature:
    """Lists unchanged, or lists of integers converted to tensors or arrays."""
    if return_tensors not in ("pt", "np", None):
        raise OptionError(f"return_tensors is {return_tensors!r}; use 'pt', 'np' or None")
    for name, rows in made.items() if return_tensors is not None else ():
        if not isinstance(rows, list):
            continue
        lengths = {len(row) for row in rows if isinstance(row, list)}
        if len(lengths) > 1:
            raise OptionError(
                f"the {name} have {min(lengths)} to {max(lengths)} tokens, which cannot be stacked; pass padding=True"
            )
        made[name] = torch.tensor(rows) if return_tensors == "pt" else np.array(rows)
    return made


def plain(ids: Any) -> Any:
    """Lists and integers, from any container."""
    if isinstance(ids, Tensor | np.ndarray | np.integer):
        return ids.tolist()
    return [plain(each) for each in ids] if isinstance(ids, list | tuple) else ids


def chosen(name: str, table: Mapping[Any, Any], options: Mapping[str, Any]) -> Any:
    value = options.get(name)
    value = getattr(value, "value", value)  # an enumeration
    if not isinstance(value, bool | str | None) or value not in table:
        words = ", ".join(repr(each) for each in table if each is not None)
        raise OptionError(f"{name} is {value!r}; use {words}")
    return table[value]


def checked_side(side: Any) -> str:
    if side not in ("left", "right"):
        raise OptionError(f"padding_side is {side!r}; use 'left' or 'right'")
    return str(side)


def rounded(width: int, multiple: int | None) -> int:
    return width if not multiple else -(-width // multiple) * multiple
