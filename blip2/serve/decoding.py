"""Decoding options from the fields of a request."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from blip2.errors import OptionError
from blip2.generation import GenerateOptions
from blip2.serve.body import too_long
from blip2.serve.errors import ApiError, in_fields
from blip2.serve.limits import Limits
from blip2.serve.schemas import Decoding
from blip2.tasks.defaults import merged
from blip2.tasks.speaker import Speaker

GREEDY_BELOW = 0.01
"""Temperatures below this are greedy decoding."""
SAME = ("num_beams", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size", "seed")
"""Fields with the same name as the option; for the others see `options_of`."""


def options_of(
    body: Decoding, defaults: GenerateOptions, limits: Limits, *, is_followed: bool = False
) -> GenerateOptions:
    """The task's default decoding, changed by the fields of the request.

    - ``temperature`` or ``top_p`` 0 is greedy decoding, whatever the other sampling fields say; above 0, or with any
      other sampling field, tokens are sampled.
    - ``is_followed``: the client wants each token as it is generated, which beam search cannot give. Then greedy
      decoding replaces beam search, unless ``num_beams`` asks for it.
    - ``n``: number of samples, or of best beams.
    - No answer is longer than the server's limit.

    Raises ApiError.
    """
    chance = _chance(body)
    given: dict[str, Any] = {name: getattr(body, name) for name in SAME} | chance
    given |= {
        "max_new_tokens": body.max_tokens,
        "min_new_tokens": body.min_new_tokens,
        "num_return": body.n,
        "stop": None if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
    }
    if not chance and body.num_beams is None and (is_followed or _is_greedy(body)) and (body.n or 1) == 1:
        given["num_beams"] = 1
    given = {name: value for name, value in given.items() if value is not None}
    if defaults.min_new_tokens > given.get("max_new_tokens", defaults.max_new_tokens):
        given.setdefault("min_new_tokens", given["max_new_tokens"])
    try:
        options = merged(defaults, given)
    except OptionError as error:
        # The first of these that was given decides that tokens are sampled.
        drawing = "sample" if body.sample else next((name for name in chance if name != "sample"), "temperature")
        called = body.called | {"temperature": body.called.get(drawing, drawing)}
        raise ApiError(400, "invalid_value", error.message_with(partial(in_fields, called=called))) from None
    most = limits.max_new_tokens
    options = replace(
        options, max_new_tokens=min(options.max_new_tokens, most), min_new_tokens=min(options.min_new_tokens, most)
    )
    for name, number in (("n", options.num_return), ("num_beams", options.num_beams)):
        if number > limits.max_rows:
            name = body.called.get(name, name)
            message = f"{name} is {number}; this server runs at most {limits.max_rows} answers or beams at once"
            raise ApiError(400, "too_many_answers", message, param=name)
    return options


def _is_greedy(body: Decoding) -> bool:
    return (body.temperature is not None and body.temperature < GREEDY_BELOW) or body.top_p == 0


def _chance(body: Decoding) -> dict[str, Any]:
    """The sampling options; none if tokens are not sampled."""
    if _is_greedy(body):
        if body.sample:
            name = "top_p" if body.top_p == 0 else "temperature"
            message = f"{body.called.get('sample', 'sample')} is true, but {name} 0 is greedy decoding; "
            raise ApiError(400, "invalid_value", f"{message}leave out one of them", param=name)
        return {}
    filters = {
        "top_k": body.top_k,
        "top_p": None if body.top_p == 1 else body.top_p,
        "min_p": body.min_p or None,
        "typical_p": None if body.typical_p == 1 else body.typical_p,
    }
    asked = {name: value for name, value in {"temperature": body.temperature, **filters}.items() if value is not None}
    if body.sample is False and asked:
        name = body.called.get(next(iter(asked)), next(iter(asked)))
        message = f"{name} is for sampling, but {body.called.get('sample', 'sample')} is false; "
        raise ApiError(400, "invalid_value", f"{message}leave out one of them", param=name)
    return {"sample": True, **asked} if asked or body.sample else {}


def fitting(speaker: Speaker, text: str, options: GenerateOptions, limits: Limits) -> GenerateOptions:
    """The options with at most as many new tokens as the model's context has left after the prompt.

    Programs ask for thousands of tokens, whatever the model. A prompt that leaves no room is refused elsewhere. Raises
    ApiError for a prompt with more tokens than the server's limit.
    """
    # Most prompts are so short that counting is unnecessary: a token has at least one character, plus about two tokens.
    at_most = len(text) + 4 if text.isascii() else sys.maxsize
    if at_most <= limits.max_prompt_tokens and speaker.tokens_left_after(at_most) >= options.max_new_tokens:
        return options
    check_prompt(speaker, text, limits)
    most = max(speaker.tokens_left(text), options.min_new_tokens, 1)
    return replace(options, max_new_tokens=min(options.max_new_tokens, most))


def check_prompt(speaker: Speaker, text: str, limits: Limits) -> None:
    """Raises ApiError for a prompt with more tokens than the server's limit."""
    number = len(speaker.tokenizer.encode(text))
    if number > limits.max_prompt_tokens:
        raise too_long(f"{number} tokens", limits)
