"""From the fields of a request to the options of its task."""

from __future__ import annotations

from typing import Any

from blip2.generation import GenerateOptions
from blip2.serve.body import too_long
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.schemas import Decoding
from blip2.tasks.defaults import merged
from blip2.tasks.speaker import Speaker

GREEDY_BELOW = 0.01
"""A temperature that leaves nothing to chance."""


def options_of(
    body: Decoding,
    defaults: GenerateOptions,
    limits: Limits,
    *,
    max_new_tokens: int | None = None,
    is_followed: bool = False,
) -> GenerateOptions:
    """The task's own way of decoding, unless the request asks for another.

    - ``temperature`` 0 is greedy decoding; above it, or with ``top_p`` below 1, tokens are drawn.
    - ``is_followed``: each token is wanted by itself, which a search with beams cannot give; then greedy decoding
      stands in for the search, unless ``num_beams`` asks for one.
    - ``n``: so many samples, or the n best of the search.

    Raises ApiError and OptionError.
    """
    max_new_tokens = max_new_tokens or body.max_tokens
    if max_new_tokens is not None and max_new_tokens > limits.max_new_tokens:
        raise ApiError(
            400, "too_many_tokens", f"max_tokens is {max_new_tokens}; at most {limits.max_new_tokens} are written here",
            param="max_tokens",
        )  # fmt: skip
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": body.num_beams,
        "length_penalty": body.length_penalty,
        "repetition_penalty": body.repetition_penalty,
        "min_new_tokens": body.min_new_tokens,
        "num_return": body.n,
        "stop": None if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        "seed": body.seed,
    }
    is_greedy = body.temperature is not None and body.temperature < GREEDY_BELOW
    if not is_greedy and (body.temperature is not None or (body.top_p or 1) < 1):
        given |= {"sample": True, "temperature": body.temperature or 1.0, "top_p": body.top_p or 1.0}
    elif body.num_beams is None and (is_greedy or is_followed) and (body.n or 1) == 1:
        given["num_beams"] = 1
    given = {name: value for name, value in given.items() if value is not None}
    if defaults.min_new_tokens > given.get("max_new_tokens", defaults.max_new_tokens):
        given.setdefault("min_new_tokens", given["max_new_tokens"])
    options = merged(defaults, given)
    if max(options.num_beams, options.num_return) > limits.max_rows:
        raise ApiError(
            400, "too_many_answers", f"{max(options.num_beams, options.num_return)} answers or beams side by side; "
            f"this server writes at most {limits.max_rows}",
        )  # fmt: skip
    return options


def check_prompt(speaker: Speaker, text: str, limits: Limits) -> None:
    """Raises ApiError for a prompt of more tokens than are read."""
    number = len(speaker.tokenizer.encode(text))
    if number > limits.max_prompt_tokens:
        raise too_long(f"{number} tokens", limits)
