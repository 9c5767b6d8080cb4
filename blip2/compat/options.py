"""The arguments of Hugging Face's ``generate`` converted to this package's.

Precedence, lowest first: Hugging Face's defaults, ``generation_config.json`` of the model's folder, a
``generation_config`` given to the call, the call's own arguments.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blip2.compat.loading import check_names
from blip2.errors import OptionError
from blip2.generation import GenerateOptions
from blip2.generation.options import SAMPLING as SAMPLING_ONLY

NEW_TOKENS = 20
"""Default number of new tokens in Hugging Face's ``generate``."""

# Their name, our name, their default.
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
    ("min_p", "min_p", 0.0),
    ("typical_p", "typical_p", 1.0),
)
# Two names for one limit: new tokens, or the prompt's and new tokens. The first takes precedence.
LENGTHS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
TOKENS = ("eos_token_id", "pad_token_id")
# Options that this package's engine handles differently or not at all: with one of these, decoding uses `lockstep`.
WATCHED: dict[str, Any] = {
    "do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "renormalize_logits": False, "remove_invalid_values": False, "return_dict_in_generate": False,
    **dict.fromkeys((
        "sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
        "forced_eos_token_id", "exponential_decay_length_penalty", "max_time", "stop_strings",
    )),
}  # fmt: skip
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Arguments of a call that no configuration holds.
CALL_ONLY = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer")
KNOWN = (*(row[0] for row in (*SHARED, *SAMPLING)), *LENGTHS[0], *LENGTHS[1], *TOKENS, *WATCHED, *OUTPUTS)
# No effect: the cache is always used and holds what it is given, the first tokens are the model's own, and assisted
# generation and prompt lookup only speed up the same text. `Seq2SeqTrainer` passes the labels, too.
WITHOUT_EFFECT = (
    "use_cache", "bos_token_id", "transformers_version", "synced_gpus", "cache_config", "low_memory", "compile_config",
    "disable_compile", "assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "trust_remote_code", "use_model_defaults", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
    "labels",
)  # fmt: skip
CACHES = ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window")
# Other decoding strategies, which are not supported: neutral values are accepted, others refused.
NOT_DONE = (
    "num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers", "constraints", "force_words_ids",
    "guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask", "watermarking_config", "token_healing",
    "top_h", "custom_generate", "past_key_values", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs",
)  # fmt: skip
CHECKED = ("cache_implementation", "decoder_start_token_id")


class GenerationConfig(dict[str, Any]):
    """A model's ``generation_config``: a dictionary whose entries are also attributes, as programs set them.

    Unset values are None, except ``max_length``: `Seq2SeqTrainer` pads to it, by default to the reference's 20.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name, 20 if name == "max_length" else None)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def update(self, *others: Any, defaults_only: bool = False, **values: Any) -> None:
        """As for any dictionary; ``defaults_only``: only set what is unset."""
        for name, value in dict(*others, **values).items():
            if not defaults_only or self.get(name) is None:
                self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def _get_default_generation_params(self) -> dict[str, Any]:
        return {}  # the defaults are those of `generate`


@dataclass(frozen=True)
class Decoding:
    """How to decode, which tokens end an answer, and which token pads rows that end early."""

    options: GenerateOptions
    """Never ``sample`` with beams: the engine does not sample beams."""
    eos_token_ids: tuple[int, ...]
    fill_token_id: int


def merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """The sources combined, the last one first. None means unset."""
    together: dict[str, Any] = {}
    for source in sources:
        given_values = {name: value for name, value in source.items() if value is not None}
        for pair in LENGTHS:  # a length in one source replaces the other name in an earlier one
            if any(name in given_values for name in pair):
                for name in pair:
                    together.pop(name, None)
        together |= given_values
    return together


def from_config(config: Any) -> dict[str, Any]:
    """The arguments in a ``generation_config``: a dictionary, or an object with ``to_dict``.

    Such objects name every setting. Unknown ones with a neutral value are ignored; another value is a TypeError that
    names it.
    """
    content = config if isinstance(config, Mapping) else config.to_dict()
    given_values = {name: value for name, value in content.items() if not _is_neutral(name, value)}
    return effective("generation_config", given_values)


def effective(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that have an effect.

    Raises TypeError for an unknown name, OptionError for what is not supported.
    """
    check_names(where, given, (*KNOWN, *CALL_ONLY, *WITHOUT_EFFECT, *NOT_DONE, *CHECKED))
    for name in NOT_DONE:
        if name in given and not _is_neutral(name, given[name]):
            raise OptionError(f"{name} is for a decoding strategy that is not supported; leave it out")
    if given.get("cache_implementation") not in (None, *CACHES):
        raise OptionError(
            f"cache_implementation is {given['cache_implementation']!r}, which would change the answers; the cache has "
            "the model's precision here, leave it out"
        )
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        if not _is_neutral(name, given.get(name)):
            warnings.warn(f"{name} has no effect: the input is an image's vectors, not ids", stacklevel=4)
    return {name: value for name, value in given.items() if name in (*KNOWN, *CALL_ONLY, "decoder_start_token_id")}


def decoding(asked: Mapping[str, Any], *, prompt_length: int, num_left: int | None) -> Decoding:
    """The complete decoding options.

    ``prompt_length``: tokens that ``max_length`` and ``min_length`` include beside the new ones. ``num_left``: tokens
    left in the context after the prompt; limits the default length. Raises OptionError for invalid options.
    """
    chosen = {ours: asked.get(theirs, default) for theirs, ours, default in SHARED}
    if chosen["sample"]:
        chosen |= {ours: asked.get(theirs, default) for theirs, ours, default in SAMPLING}
    elif unused := [theirs for theirs, _, neutral in SAMPLING if asked.get(theirs, neutral) not in (neutral, 0)]:
        warnings.warn(f"{', '.join(unused)} has no effect without do_sample=True", stacklevel=4)
    chosen["max_new_tokens"] = _most(asked, prompt_length, num_left)
    chosen["min_new_tokens"] = _least(asked, prompt_length)
    try:
        if chosen["sample"] and chosen["num_beams"] != 1:  # the engine does not sample beams
            GenerateOptions(**chosen | {"num_beams": 1})
            chosen = {name: value for name, value in chosen.items() if name not in SAMPLING_ONLY} | {"sample": False}
        options = GenerateOptions(**chosen)
    except OptionError as error:
        raise OptionError(_in_their_words(str(error))) from None
    ends, pad = _tokens("eos_token_id", asked), _tokens("pad_token_id", asked)[0]
    # Beam search in transformers treats a pad token of 0, which T5 has, as unset, and pads with the end token.
    return Decoding(options, ends, pad or ends[0] if options.num_beams > 1 else pad)


def is_watched(asked: Mapping[str, Any], how: Decoding) -> bool:
    """Whether rows have to stay in lockstep, as in the reference; otherwise the engine gives the same, faster."""
    call_only = [asked.get(name) for name in CALL_ONLY if name != "tokenizer"]
    is_handed = any(each is not None and not (isinstance(each, list | tuple) and not each) for each in call_only)
    return (
        is_handed
        or len(how.eos_token_ids) > 1
        or any(
            not (value is neutral or (isinstance(value, bool | int | float) and value == neutral))
            for name, neutral in WATCHED.items()
            for value in [asked.get(name, neutral)]
        )
    )


def _most(asked: Mapping[str, Any], prompt_length: int, num_left: int | None) -> Any:
    if "max_new_tokens" in asked:
        return asked["max_new_tokens"]
    if "max_length" not in asked:
        return NEW_TOKENS if num_left is None else max(1, min(NEW_TOKENS, num_left))
    if asked["max_length"] <= prompt_length:
        raise OptionError(
            f"max_length is {asked['max_length']}, which includes the prompt of {prompt_length} tokens, "
            "with those of the image; give max_new_tokens instead"
        )
    return asked["max_length"] - prompt_length


def _least(asked: Mapping[str, Any], prompt_length: int) -> Any:
    if "min_new_tokens" in asked:
        return asked["min_new_tokens"]
    return max(0, asked.get("min_length", 0) - prompt_length)


def _tokens(name: str, asked: Mapping[str, Any]) -> tuple[int, ...]:
    """One token id or several."""
    value = asked[name].tolist() if isinstance(asked[name], Tensor) else asked[name]
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    is_whole = all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    if not ids or not is_whole or (len(ids) > 1 and name == "pad_token_id"):
        several = "" if name == "pad_token_id" else " or a list of them"
        raise OptionError(f"{name} is {value!r}; give a token id{several}")
    return ids


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a setting has no effect: unset, off, or for a strategy that nothing else requests."""
    is_off = value is not True and value in (None, 0, 1, [], {})
    return value is None or (name not in KNOWN and (is_off or name.startswith("_") or "assistant" in name))


def _in_their_words(message: str) -> str:
    for theirs, ours, _ in SHARED:
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message
