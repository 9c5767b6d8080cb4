"""The arguments of Hugging Face's ``generate`` in this package's words.

Later sources go before earlier ones: Hugging Face's defaults, ``generation_config.json`` of the model's folder, a
``generation_config`` given to the call, the call's own arguments.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip2.compat.loading import check_names
from blip2.errors import OptionError
from blip2.generation import GenerateOptions

NEW_TOKENS = 20
"""What Hugging Face's ``generate`` writes unless told otherwise."""

# Their name, ours, their default.
SHARED: tuple[tuple[str, str, Any], ...] = (
    ("num_beams", "num_beams", 1),
    ("length_penalty", "length_penalty", 1.0),
    ("early_stopping", "early_stopping", False),
    ("num_return_sequences", "num_return", 1),
    ("do_sample", "sample", False),
    ("repetition_penalty", "repetition_penalty", 1.0),
    ("no_repeat_ngram_size", "no_repeat_ngram_size", 0),
)
SAMPLING: tuple[tuple[str, str, Any], ...] = (
    ("temperature", "temperature", 1.0),
    ("top_k", "top_k", 50),
    ("top_p", "top_p", 1.0),
)
# Two names for one thing: new tokens, or the prompt's tokens and the new ones. The first goes before the second.
LENGTHS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
TOKENS = ("eos_token_id", "pad_token_id")
KNOWN = (*(row[0] for row in (*SHARED, *SAMPLING)), *LENGTHS[0], *LENGTHS[1], *TOKENS)
# Change nothing: the cache is always used, and the first tokens are the model's own.
WITHOUT_EFFECT = ("use_cache", "bos_token_id", "decoder_start_token_id", "transformers_version")


@dataclass(frozen=True)
class Decoding:
    """How to decode, which token ends an answer, and which fills the rows that end early."""

    options: GenerateOptions
    eos_token_id: int
    fill_token_id: int


def merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """What the sources say together, the last one first. None means that nothing is said."""
    together: dict[str, Any] = {}
    for source in sources:
        said = {name: value for name, value in source.items() if value is not None}
        for pair in LENGTHS:  # a length in one source replaces the other name's in an earlier one
            if any(name in said for name in pair):
                for name in pair:
                    together.pop(name, None)
        together |= said
    return together


def from_config(config: Any) -> dict[str, Any]:
    """The arguments in a ``generation_config``: a dictionary, or an object with ``to_dict``.

    Such a thing names every setting there is. Those that are not known here and change nothing are passed over;
    one that would is a TypeError that names it.
    """
    content = config if isinstance(config, Mapping) else config.to_dict()
    known = (*KNOWN, *WITHOUT_EFFECT)
    said = {name: value for name, value in content.items() if not _is_neutral(name, value)}
    check_names("generation_config", said, known)
    return {name: value for name, value in said.items() if name in KNOWN}


def decoding(asked: Mapping[str, Any], *, prompt_length: int, room: int | None) -> Decoding:
    """What was asked for, complete.

    ``prompt_length``: the tokens that ``max_length`` and ``min_length`` count beside the new ones. ``room``: what fits
    after the prompt; the default length keeps within it. Raises OptionError for what is not possible.
    """
    chosen = {ours: asked.get(theirs, default) for theirs, ours, default in SHARED}
    if chosen["sample"]:
        chosen |= {ours: asked.get(theirs, default) for theirs, ours, default in SAMPLING}
    elif unused := [theirs for theirs, _, neutral in SAMPLING if asked.get(theirs, neutral) not in (neutral, 0)]:
        warnings.warn(f"{', '.join(unused)} changes nothing without do_sample=True", stacklevel=3)
    chosen["max_new_tokens"] = _most(asked, prompt_length, room)
    chosen["min_new_tokens"] = _least(asked, prompt_length)
    try:
        options = GenerateOptions(**chosen)
    except OptionError as error:
        raise OptionError(_in_their_words(str(error))) from None
    end, pad = _token("eos_token_id", asked), _token("pad_token_id", asked)
    # Beam search in transformers takes a pad token of 0, which T5 has, for none, and fills with the end token.
    return Decoding(options, end, pad or end if options.num_beams > 1 else pad)


def _most(asked: Mapping[str, Any], prompt_length: int, room: int | None) -> Any:
    if "max_new_tokens" in asked:
        return asked["max_new_tokens"]
    if "max_length" not in asked:
        return NEW_TOKENS if room is None else max(1, min(NEW_TOKENS, room))
    if asked["max_length"] <= prompt_length:
        raise OptionError(
            f"max_length is {asked['max_length']}, which counts the prompt too, and that has {prompt_length} tokens, "
            "the image's among them; give max_new_tokens instead"
        )
    return asked["max_length"] - prompt_length


def _least(asked: Mapping[str, Any], prompt_length: int) -> Any:
    if "min_new_tokens" in asked:
        return asked["min_new_tokens"]
    return max(0, asked.get("min_length", 0) - prompt_length)


def _token(name: str, asked: Mapping[str, Any]) -> int:
    """A single token id; a list of one is as good."""
    value = asked[name]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise OptionError(f"{name} is {value!r}; give one token id")
    return value


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a setting says nothing: unset, switched off, or of a way of decoding that nothing else asks for."""
    is_off = value is not True and value in (None, 0, 1, [], {})
    return value is None or (name not in KNOWN and (is_off or name.startswith("_") or "assistant" in name))


def _in_their_words(message: str) -> str:
    for theirs, ours, _ in SHARED:
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message
