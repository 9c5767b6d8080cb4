"""Field names of other APIs: Python, the command line, OpenAI, and servers with OpenAI-compatible APIs.

Every field is either used, or known to have no effect, or refused. Unknown fields are reported in a header.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from blip2.serve.errors import ApiError
from blip2.serve.schemas import SCHEMAS

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"

ALIASES: dict[str, tuple[str, ...]] = {
    "max_tokens": ("max_completion_tokens", "max_new_tokens", "num_predict", "n_predict"),
    "min_new_tokens": ("min_tokens",),
    "n": ("num_return", "num_captions", "num_answers", "num_return_sequences"),
    "num_beams": ("beams",),
    "no_repeat_ngram_size": ("no_repeat_ngram",),
    "repetition_penalty": ("repeat_penalty",),
    "sample": ("do_sample",),
    "stop": ("stop_strings", "stop_sequences"),
    "typical_p": ("typ_p",),
    "texts": ("text", "labels"),
}
"""Aliases: of the command line and Python (ours and transformers), vLLM, llama.cpp and Ollama."""

OFF: dict[str, tuple[Any, ...]] = {
    "max_tokens": (-2, -1, 0),
    "min_new_tokens": (-1,),
    "no_repeat_ngram_size": (-1, 0),
    "repetition_penalty": (0,),
    "seed": (-1,),
    "stop": ("", []),
    "top_k": (-1, 0),
    "dimensions": (-1, 0),
}
"""Values that mean "not given" in vLLM, llama.cpp, Ollama, LM Studio or Open WebUI; null does so everywhere."""

LISTS = ("stop", "texts", "choices")
"""Fields that a form may repeat."""

OPENAI = """user store metadata service_tier parallel_tool_calls reasoning_effort prediction safety_identifier
prompt_cache_key prompt_cache_retention prompt_cache_options verbosity web_search_options audio moderation"""
VLLM = """priority request_id skip_special_tokens spaces_between_special_tokens add_generation_prompt add_special_tokens
chat_template_kwargs mm_processor_kwargs documents return_tokens_as_token_ids return_token_ids cache_salt
kv_transfer_params include_reasoning thinking_token_budget"""
LLAMA_CPP = """cache_prompt id_slot slot_id n_probs n_keep samplers timings_per_token return_progress return_tokens
reasoning_format reasoning_budget post_sampling_probs t_max_predict_ms dynatemp_exponent xtc_threshold dry_base
dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat_tau mirostat_eta repeat_last_n penalize_nl min_keep
backend_sampling"""
"""Includes parameters of methods that are off, unless a field in `REFUSED` turns the method on."""
PROGRAMS = """keep_alive ttl num_ctx num_thread num_gpu num_keep num_batch think thinking enable_thinking reasoning
draft_model chat_id session_id message_id model_item provider route transforms models plugins usage include_usage
timeout drop_params"""
"""Fields of Ollama, LM Studio, Open WebUI, OpenRouter and LiteLLM."""
OF_EMBEDDINGS = """user priority request_id add_special_tokens input_type task truncate truncation
truncate_prompt_tokens keep_alive timeout drop_params embed_dtype endianness"""
IGNORED_FIELDS = {
    CHAT: frozenset(f"{OPENAI} {VLLM} {LLAMA_CPP} {PROGRAMS}".split()),
    EMBEDDINGS: frozenset(OF_EMBEDDINGS.split()),
}
"""Fields that other clients send and that change no answer here."""

PLAIN_TEXT = "this model generates plain text only"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "this model does not call tools"),
    "functions": (([],), "this model does not call functions"),
    "tool_choice": (("none", "auto"), "this model does not call tools"),
    "function_call": (("none", "auto"), "this model does not call functions"),
    "response_format": (({"type": "text"}, "text", {}), PLAIN_TEXT),
    "modalities": ((["text"], []), PLAIN_TEXT),
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "presence_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({}, []), "tokens cannot be biased"),
    "best_of": ((1,), "use n with num_beams"),
    "use_beam_search": ((False,), "use num_beams"),
    "ignore_eos": ((False,), "use min_new_tokens"),
    "stop_token_ids": (([],), "use stop, with texts"),
    "bad_words": (([],), "words cannot be forbidden"),
    "allowed_token_ids": (([],), "tokens cannot be restricted"),
    "logits_processors": (([],), "logits cannot be processed"),
    "include_stop_str_in_output": ((False,), "an answer ends before its stop text"),
    "echo": ((False,), "the question is not repeated"),
    "continue_final_message": ((False,), "the last message has to be a user message"),
    "truncate_prompt_tokens": ((-1,), "turns that do not fit are dropped as a whole"),
    "prompt_logprobs": ((0, False), "only generated tokens have logprobs"),
    "chat_template": (("",), "the model has a fixed prompt format"),
    "guided_choice": (([],), "use choices of /ask"),
    "guided_json": (({}, ""), PLAIN_TEXT),
    "guided_regex": (("",), PLAIN_TEXT),
    "guided_grammar": (("",), PLAIN_TEXT),
    "structured_outputs": (({},), PLAIN_TEXT),
    "json_schema": (({}, ""), PLAIN_TEXT),
    "grammar": (("",), PLAIN_TEXT),
    "format": (("",), PLAIN_TEXT),
    "suffix": (("",), "answers are generated from left to right"),
    "mirostat": ((0,), "use temperature and top_p"),
    "tfs_z": ((0, 1), "use top_p"),
    "top_a": ((0,), "use min_p"),
    "top_n_sigma": ((-1, 0), "use min_p"),
    "xtc_probability": ((0,), "use temperature"),
    "dynatemp_range": ((0,), "use temperature"),
    "dry_multiplier": ((0,), "use no_repeat_ngram_size"),
    "smoothing_factor": ((0,), "use temperature"),
    "penalty_alpha": ((0,), "use top_k"),
    "guidance_scale": ((0, 1), "only the question guides the answer"),
    "negative_prompt": (("",), "only the question guides the answer"),
    "max_length": ((-1, 0), "use max_tokens, which counts only the answer"),
    "min_length": ((0,), "use min_new_tokens, which counts only the answer"),
    "system": (("",), "this model does not follow a system prompt"),
    "system_prompt": (("",), "this model does not follow a system prompt"),
    "instructions": (("",), "this model does not follow a system prompt"),
    "extra_body": (({},), "put its fields at the top level"),
    "options": (({},), "put its fields at the top level"),
}
"""Fields that would change an answer but are not supported: the values that have no effect, and what to do instead."""

AS_QUESTION, SHOWN = "put the question into a message", "put the image into an image_url part of a message"
LISTED, LOOKED_AT = "put texts into input", 'put the image into input, as {"image": "data:image/...;base64,..."}'
INSTEAD: dict[str, dict[str, str]] = {
    CHAT: {"prompt": AS_QUESTION, "question": AS_QUESTION, "text": AS_QUESTION, "image": SHOWN, "images": SHOWN},
    EMBEDDINGS: {"prompt": LISTED, "text": LISTED, "texts": LISTED, "image": LOOKED_AT, "images": LOOKED_AT},
}
"""Replacements for fields of other routes."""

STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")
NEAR = 0.7
"""Similarity (see `difflib`) from which an unknown name is taken for a misspelt known one."""
SHORTENED = 4
"""Length from which a prefix is taken for the name."""
MAX_FIELDS, MAX_REPORTED = 300, 8


@dataclass
class ParsedFields:
    """``fields``: by the schema's names. ``called``: the caller's names of fields that he calls differently.
    ``ignored``: unknown fields."""

    fields: dict[str, Any] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def names_of(route: str) -> dict[str, str]:
    """Every accepted name of a route -> the name in its schema."""
    own = [name for name in SCHEMAS[route].model_fields if name != "called"]
    others = {other: name for name in own for other in ALIASES.get(name, ())}
    return {**others, **{name: name for name in own}}


NAMES = {route: names_of(route) for route in SCHEMAS}


def parse_fields(given: Any, route: str) -> ParsedFields:
    """The fields of a request under the schema's names. Raises ApiError for unknown and unsupported fields."""
    if not isinstance(given, dict):
        kind = "list" if isinstance(given, list) else "text" if isinstance(given, str) else "single value"
        raise ApiError(400, "invalid_value", f"the body is a {kind}; {hint_for_body(route)}")
    if len(given) > MAX_FIELDS:
        raise ApiError(400, "too_many_values", f"the body has {len(given):,} fields; at most {MAX_FIELDS} are allowed")
    found = ParsedFields()
    if given.get("tool_choice") == "none":  # tools are listed, but none may be called
        given = {name: value for name, value in given.items() if name not in ("tools", "tool_choice")}
    for name, value in given.items():
        if (own := NAMES[route].get(name)) is None:
            _unknown(name, value, route, found.ignored)
        elif not _is_off(own, value):
            if own in found.fields and found.fields[own] != value:
                before = found.called.get(own, own)
                message = f"{before} and {name} mean the same, but have different values; send one of them"
                raise ApiError(400, "invalid_value", message, param=name)
            found.fields[own] = value
            if name != own:
                found.called[own] = name
    options = found.fields.get("stream_options")
    for name in list(options)[:MAX_FIELDS] if isinstance(options, dict) else ():
        if name not in STREAM_OPTIONS and (near := nearest(name, list(STREAM_OPTIONS), NEAR)) is not None:
            message = f"there is no field {name[:40]!r} of stream_options; did you mean {near!r}?"
            raise ApiError(400, "unknown_field", message, param="stream_options")
    return found


def _is_off(name: str, value: Any) -> bool:
    if value is None:
        return True
    off = OFF.get(name, ())
    if isinstance(value, str) and value:  # all values of a form are texts
        return any(isinstance(each, int) and value.strip() in (str(each), f"{each}.0") for each in off)
    return not isinstance(value, bool) and value in off


def _unknown(name: str, value: Any, route: str, ignored: list[str]) -> None:
    """Raises ApiError, unless the field may be ignored."""
    known = NAMES[route]
    is_plain = route not in IGNORED_FIELDS
    if not is_plain and name in IGNORED_FIELDS[route]:
        return
    if route == CHAT and name in REFUSED:
        harmless, remedy = REFUSED[name]
        if value is None or any(value == each for each in harmless):
            return
        raise ApiError(400, "unsupported_parameter", f"{name} is not supported: {remedy}", param=name)
    shown = repr(name[:40])
    begin = f"{route} has no field {shown}; "
    if (where := _where(name, route)) is not None:
        raise ApiError(400, "unknown_field", begin + where, param=name[:40])
    candidates = [*known, *(REFUSED if route == CHAT else ()), *(() if is_plain else _of_plain_routes())]
    near = nearest(name, candidates, 0.6 if is_plain else NEAR)
    if near is not None:
        place = "" if near in known or near in REFUSED else f" ({_where(near, route)})"
        raise ApiError(400, "unknown_field", f"{begin}did you mean {near!r}?{place}", param=name[:40])
    if is_plain:
        own = ", ".join(name for name in known if known[name] == name)
        raise ApiError(400, "unknown_field", f"{begin}it has {own}", param=name[:40])
    if len(ignored) < MAX_REPORTED and re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name):
        ignored.append(name)


def _where(name: str, route: str) -> str | None:
    """What to use instead of a field of another route, or which routes have it."""
    if name in (instead := INSTEAD.get(route, {})):
        return instead[name]
    routes = [other for other, names in NAMES.items() if name in names]
    return f"{' and '.join(routes)} {'has' if len(routes) == 1 else 'have'} it" if routes else None


def _of_plain_routes() -> list[str]:
    return [name for route, names in NAMES.items() if route not in IGNORED_FIELDS for name in names]


def nearest(name: str, known: list[str], cutoff: float) -> str | None:
    """The most similar known name; case and underscores matter little."""

    def plain(name: str) -> str:
        return re.sub("[^a-z0-9]", "", name.lower())

    if len(name) > 60:
        return None
    by_plain = {plain(each): each for each in reversed(known)}
    found = difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=cutoff)
    if not found and len(plain(name)) >= SHORTENED:
        found = [each for each in by_plain if each.startswith(plain(name))]
    return by_plain[found[0]] if found else None


def other_path(path: str) -> str:
    """The message for an unknown path."""
    begin = f"there is no route {path[:60]!r}; "
    if path.rstrip("/").endswith(("/responses", "/completions", "/messages", "/generate", "/api/chat")):
        return f"{begin}this server offers OpenAI's chat completions at {CHAT}"
    near = difflib.get_close_matches(path[:60], SCHEMAS, n=1, cutoff=NEAR)
    return begin + (f"did you mean {near[0]}?" if near else "/openapi.json lists the routes")


def hint_for_body(route: str) -> str:
    """The message for a body of another kind."""
    if route == CHAT:
        return (
            'send JSON such as {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, '
            '{"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}]}]}, with the header '
            "Content-Type: application/json"
        )
    if route == EMBEDDINGS:
        return 'send JSON such as {"input": ["a text"]}, with the header Content-Type: application/json'
    return (
        f"send a form with the image as a file (curl -F image=@FILE ... {route}), or JSON such as "
        '{"image": "data:image/...;base64,..."} with the header Content-Type: application/json'
    )
