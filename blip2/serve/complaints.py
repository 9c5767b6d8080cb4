"""Messages for invalid fields of a request, in JSON terms and with the caller's field names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blip2.serve.errors import ApiError
from blip2.serve.schemas import BRANCH

WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "string_type": lambda of: "give a text",
    "string_too_short": lambda of: "it is empty; write something, or leave it out",
    "string_too_long": lambda of: f"it has more than {of['max_length']:,} characters; shorten it",
    "string_unicode": lambda of: "it contains lone surrogates; give valid Unicode",
    "list_type": lambda of: "give a list",
    "too_short": lambda of: "it is empty; give at least one",
    "too_long": lambda of: f"it has more than {of['max_length']:,} items; give fewer",
    "bool_type": lambda of: "give true or false",
    "bool_parsing": lambda of: "give true or false",
    "int_type": lambda of: "give a whole number",
    "int_parsing": lambda of: "give a whole number",
    "int_from_float": lambda of: "give a whole number",
    "int_parsing_size": lambda of: "give a smaller number",
    "float_type": lambda of: "give a number",
    "float_parsing": lambda of: "give a number",
    "finite_number": lambda of: "give a finite number",
    "greater_than_equal": lambda of: f"give {_number(of['ge'])} or more",
    "greater_than": lambda of: f"give more than {_number(of['gt'])}",
    "less_than_equal": lambda of: f"give {_number(of['le'])} or less",
    "less_than": lambda of: f"give less than {_number(of['lt'])}",
    "literal_error": lambda of: f"give {of['expected']}",
    "model_type": lambda of: "give an object, {...}",
    "model_attributes_type": lambda of: "give an object, {...}",
    "dict_type": lambda of: "give an object, {...}",
}
"""Messages by pydantic's error type, replacing its Python terms. Our own error types need none."""
OURS = ("kind", "number_type", "token_ids")

HINTS = {
    "messages": 'give a list of messages, such as [{"role": "user", "content": "..."}]',
    "role": "give 'user', or 'assistant' for an answer",
    "type": "say 'text' or 'image_url'",
    "url": "give data:image/...;base64, then the image file in base64",
    "image": "give data:image/...;base64, then the image file in base64",
    "image_url": 'give {"url": "data:image/...;base64,..."}',
    "input": "give a text, or a list of texts",
    "question": "give a question",
    "texts": "give a list of texts",
    "choices": "give a list of texts",
    "early_stopping": "give true, false or 'never'",
}
"""What a field has to contain, for messages about missing fields and wrong types."""


def of_validation(problems: Sequence[Any], called: Mapping[str, str] | None = None) -> ApiError:
    """The message for pydantic's first problem. The value is not repeated, since it may be an image.

    ``called``: the caller's names of fields that he calls differently.
    """
    first = problems[0]
    kind, of = first["type"], first.get("ctx", {})
    steps = [step for step in first["loc"] if step != "body" and not str(step).startswith(BRANCH)]
    if steps and isinstance(steps[0], str):
        steps[0] = (called or {}).get(steps[0], steps[0])
    last = next((step for step in reversed(steps) if isinstance(step, str)), "")
    where = path_of(steps) or None
    if kind == "missing":
        words = f"is missing; {HINTS[last]}" if last in HINTS else "is missing"
        message = f"{where} {words}"
    else:
        words = first["msg"] if kind in OURS else WORDS.get(kind, lambda of: "it cannot be used")(of)
        if kind.endswith(("_type", "bool_parsing")) and kind not in OURS and steps and steps[-1] == last:
            words = HINTS.get(last, words)
        message = f"{where}: {words}" if where else words
    return ApiError(400, "invalid_value", message[:500], param=where and where[:100])


def path_of(steps: Sequence[str | int]) -> str:
    """messages[0].content[1].image_url.url"""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.removeprefix(".")


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"
