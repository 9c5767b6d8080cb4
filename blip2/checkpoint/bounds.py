"""Bounds of values in ``config.json``, to detect damaged or foreign files before a model is built.

The bounds are far beyond every published model.

Each check raises ValueError with the problem and the expected value.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

AGAIN = "fetch the file again"
WIDEST, MOST_LAYERS, MOST_TOKENS, LARGEST_IMAGE = 2**16, 512, 2**22, 4096

BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, WIDEST),
    "head_size": (1, WIDEST),
    "intermediate_size": (1, 2 * WIDEST),
    "projection_size": (1, WIDEST),
    "num_layers": (1, MOST_LAYERS),
    "num_decoder_layers": (1, MOST_LAYERS),
    "cross_attention_frequency": (1, MOST_LAYERS),
    "num_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "image_size": (1, LARGEST_IMAGE),
    "patch_size": (1, LARGEST_IMAGE),
    "num_prefix_tokens": (0, 1024),
    "rotary_base": (0, 1e9),
    "num_query_tokens": (1, 4096),
    "vocab_size": (1, MOST_TOKENS),
    "max_position_embeddings": (1, 2**20),
    "num_buckets": (4, 2**16),
    "max_distance": (4, 2**20),
    "layer_norm_eps": (1e-30, 0.1),
    "norm_eps": (1e-30, 0.1),
    "dropout": (0, 0.99),
}
"""By our names; token ids are bounded by the vocabulary instead."""


def check_value(name: str, value: Any, like: Any, where: str = "", bounds: tuple[float, float] | None = None) -> Any:
    """Returns the value if it has the type of ``like`` (bool, int, float or str) and is within the bounds,
    inclusive."""
    if isinstance(like, bool):
        is_kind, words = isinstance(value, bool), "true or false"
    elif isinstance(like, str):
        is_kind, words = isinstance(value, str), "a text"
    else:
        kinds = int if isinstance(like, int) else (int, float)
        is_kind = isinstance(value, kinds) and not isinstance(value, bool)
        least, most = bounds or (0, MOST_TOKENS)
        is_kind = is_kind and least <= value <= most  # false for NaN
        words = f"a {'whole ' if isinstance(like, int) else ''}number from {least:g} to {most:.10g}"
    if not is_kind:
        place = f" in {where}" if where else ""
        raise ValueError(
            f"{name} is {reprlib.repr(value)}{place}; it should be something like {like!r}, {words}; {AGAIN}"
        )
    return value


def check_token(name: str, value: Any, vocab_size: int, where: str) -> None:
    """Check that a token is in the vocabulary."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in {where}; a token of this model is a whole number from 0 to "
            f"{vocab_size - 1} (vocab_size is {vocab_size}); {AGAIN}"
        )


def check_names(section: Collection[str], names: Collection[str], where: str) -> None:
    """Check that no key of a section is an absent name with a flipped bit."""
    for absent in sorted(set(names) - set(section)):
        if near := [key for key in section if key not in names and differs_in_a_bit(key, absent)]:
            raise ValueError(f"there is {near[0]} but no {absent} in {where}; {AGAIN}")


def differs_in_a_bit(key: str, name: str) -> bool:
    """Whether a key is a name with one flipped bit; bos_token_id and eos_token_id are not related so."""
    differ = [ord(one) ^ ord(other) for one, other in zip(key, name, strict=False) if one != other]
    return len(key) == len(name) and len(differ) == 1 and differ[0].bit_count() == 1
