"""The vocabulary of ``processor.tokenizer``: tokens by names and ids, and the roles of special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blip2.compat.rows import plain
from blip2.errors import OptionError
from blip2.text import Tokenizer

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
SETTABLE = ("padding_side", *(f"{name}_token" for name in SPECIAL))


def special_token(name: str) -> property:
    """``eos_token`` and its like: a token of the vocabulary, or None."""

    def get(tokenizer: Any) -> str | None:
        return tokenizer._names[name]

    def put(tokenizer: Any, token: Any) -> None:
        if token is not None and tokenizer.find(str(token)) is None:
            raise OptionError(f"unknown token {str(token)!r}; add it first with add_special_tokens")
        tokenizer._names[name] = None if token is None else str(token)

    return property(get, put)


def special_token_id(name: str) -> property:
    """``eos_token_id`` and its like."""

    def get(tokenizer: Any) -> int | None:
        token = tokenizer._names[name]
        return None if token is None else tokenizer._tokenizer.token_id(token)

    def put(tokenizer: Any, token_id: int | None) -> None:
        setattr(tokenizer, f"{name}_token", None if token_id is None else tokenizer.convert_ids_to_tokens(token_id))

    return property(get, put)


class Vocabulary:
    """Tokens, their names and ids."""

    bos_token = special_token("bos")
    bos_token_id = special_token_id("bos")
    eos_token = special_token("eos")
    eos_token_id = special_token_id("eos")
    unk_token = special_token("unk")
    unk_token_id = special_token_id("unk")
    sep_token = special_token("sep")
    sep_token_id = special_token_id("sep")
    pad_token = special_token("pad")
    pad_token_id = special_token_id("pad")
    cls_token = special_token("cls")
    cls_token_id = special_token_id("cls")
    mask_token = special_token("mask")
    mask_token_id = special_token_id("mask")

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, Any]) -> None:
        """``names``: of the special tokens, by role; None for those that the vocabulary lacks."""
        self._tokenizer = tokenizer
        self._names: dict[str, str | None] = {}
        for purpose in SPECIAL:
            entry = names.get(purpose)
            token = entry.get("content") if isinstance(entry, Mapping) else entry
            self._names[purpose] = token if isinstance(token, str) and tokenizer.find(token) is not None else None

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token by its name, or of several; the unknown token's for an unknown name."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._tokenizer.find(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The name of a token by its id, or of several."""
        ids = plain(ids)
        if isinstance(ids, int):
            return self._tokenizer.name_of(ids)
        skipped = self._tokenizer.special_ids() if skip_special_tokens else ()
        return [self._tokenizer.name_of(each) for each in ids if each not in skipped]

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.vocabulary()

    def get_added_vocab(self) -> dict[str, int]:
        trained = self._tokenizer.vocabulary(with_added=False)
        special = self._tokenizer.special_ids()
        every = self._tokenizer.vocabulary().items()
        added = {name: each for name, each in every if name not in trained or each in special}
        return dict(sorted(added.items(), key=lambda pair: pair[1]))

    @property
    def vocab_size(self) -> int:
        """The size of the trained vocabulary; ``len()`` includes added tokens."""
        return len(self._tokenizer.vocabulary(with_added=False))

    def __len__(self) -> int:
        return len(self._tokenizer.vocabulary())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {f"{name}_token": token for name, token in self._names.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._tokenizer.token_id(token) for token in self.all_special_tokens]

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary and return how many were new. Then call the model's
        ``resize_token_embeddings(len(tokenizer))``, otherwise it refuses their ids."""
        is_one = isinstance(new_tokens, str) or hasattr(new_tokens, "content")
        added = self._tokenizer.add([new_tokens] if is_one else list(new_tokens), special=special_tokens)
        self._changed()
        return added

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Set the roles of tokens: ``{"pad_token": "[PAD]"}``; unknown tokens are added."""
        number = 0
        for name, value in special_tokens_dict.items():
            number += self.add_tokens(value, special_tokens=True)
            if name in SETTABLE:
                setattr(self, name, str(value))
        return number

    def find(self, token: str) -> int | None:
        """The id of a token by its name; None if there is none."""
        return self._tokenizer.find(token)

    def _changed(self) -> None:
        """Record that the vocabulary differs from the files."""
