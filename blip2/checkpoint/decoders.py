"""Published configurations of decoders (config.json, or the text_config of a BLIP-2), converted to the configuration of
`blip2.language.decoder`.

Absent fields get the defaults of transformers: a table for each ``model_type``. A null value is not absent.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

from blip2.checkpoint.bounds import AGAIN, BOUNDS, check_names, check_token, check_value
from blip2.checkpoint.gpts import DEFAULTS as GPTS
from blip2.checkpoint.gpts import gpt_values
from blip2.config import DecoderConfig, Rotary

Text = dict[str, Any]

FIELDS = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_key_value_heads", "num_key_value_heads"),
    ("head_size", "head_dim"),
    ("intermediate_size", "intermediate_size"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("norm_eps", "rms_norm_eps"),
)
"""Our name and the published name of fields that all decoders have."""

LLAMA: Text = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
QWEN2: Text = LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "bos_token_id": None, "eos_token_id": None, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
GEMMA: Text = LLAMA | {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "use_bidirectional_attention": False,
}  # fmt: skip
GEMMA2: Text = GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
LLAMAS: dict[str, Text] = {
    "llama": LLAMA,
    "mistral": LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 2**17, "sliding_window": 4096,
    },
    "qwen2": QWEN2,
    "qwen3": QWEN2 | {"head_dim": 128},
    "smollm3": QWEN2 | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004, "sliding_window": None,
        "no_rope_layers": None, "no_rope_layer_interval": 4,
    },
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2 | {
        "vocab_size": 262208, "max_position_embeddings": 2**17, "sliding_window_pattern": 6, "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0, "final_logit_softcapping": None, "attn_logit_softcapping": None,
    },
    "phi3": LLAMA | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000, "pad_token_id": 32000,
        "sliding_window": None, "partial_rotary_factor": 1.0,
    },
    "granite": LLAMA | {
        "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    },
}  # fmt: skip
KINDS = (*LLAMAS, *GPTS)
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
}  # fmt: skip
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
MOST_FACTOR = 2**20


def parse_decoder(published: Text) -> DecoderConfig:
    """The configuration from published fields; ValueError for an unsupported one."""
    kind = published["model_type"]
    text, values = gpt_values(published) if kind in GPTS else _values(published)
    activation = text.get("hidden_activation") or text.get("activation_function") or text.get("hidden_act", "gelu_new")
    if kind == "gemma" and activation == "gelu":  # a mistake in early files
        activation = "gelu_pytorch_tanh"
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {reprlib.repr(activation)} in {kind}; use one of {', '.join(ACTIVATIONS)}")
    values |= _tokens(text, kind) | {
        "activation": ACTIVATIONS[activation],
        "is_tied": _flag(text, "tie_word_embeddings", kind),
        "rotary": _rotary(text, _stretching(text, kind), kind)
        if values.get("positions", "rotary") == "rotary"
        else None,
    }
    if values["rotary"] and values["rotary"].scaling == "longrope":
        # Beyond this length, all earlier tokens would have to be recomputed with other factors.
        values["max_position_embeddings"] = min(values["max_position_embeddings"], values["rotary"].original_length)
    return DecoderConfig(model_type=kind, published=published, **values)


def _values(published: Text) -> tuple[Text, Text]:
    """The values for `DecoderConfig` that only Llama-like models have, and the fields with defaults filled in."""
    kind = published["model_type"]
    text = LLAMAS[kind] | published
    check_names(published, {*LLAMAS[kind], "rope_parameters", "rope_scaling"}, kind)
    if text["num_key_value_heads"] is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    for ours, theirs in FIELDS[:4]:
        check_value(theirs, text[theirs], LLAMA[theirs], kind, BOUNDS[ours])
    if text["head_dim"] is None:
        if text["hidden_size"] % text["num_attention_heads"]:
            raise ValueError(
                f"num_attention_heads is {text['num_attention_heads']} in {kind}, and does not divide hidden_size, "
                f"which is {text['hidden_size']}; {AGAIN}"
            )
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    values = {
        ours: check_value(theirs, text[theirs], LLAMA[theirs] or 1, kind, BOUNDS[ours]) for ours, theirs in FIELDS
    }
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        raise ValueError(
            f"num_key_value_heads is {text['num_key_value_heads']} in {kind}, and does not divide num_attention_heads, "
            f"which is {text['num_attention_heads']}; {AGAIN}"
        )
    if text.get("use_bidirectional_attention"):
        raise ValueError(f"use_bidirectional_attention is set in {kind}; only causal language models are supported")
    return text, values | {
        "has_qkv_bias": _flag(text, "attention_bias", kind),
        "has_output_bias": _flag(text, "attention_bias", kind),
        "has_feed_forward_bias": _flag(text, "mlp_bias", kind),
        **_windows(text, kind),
        **OTHERS.get(kind, lambda text: {})(text),
    }


# ---- fields of single families -------------------------------------------------------------------------


def _qwen2(text: Text) -> Text:
    return {"has_qkv_bias": True, "has_output_bias": False, "has_feed_forward_bias": False}


def _qwen3(text: Text) -> Text:
    return {"has_head_norms": True, "has_feed_forward_bias": False}


def _smollm3(text: Text) -> Text:
    num_layers, interval = text["num_hidden_layers"], text["no_rope_layer_interval"]
    turned = text["no_rope_layers"]  # 1 for layers with positions
    if turned is None:
        turned = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    _check_layers("no_rope_layers", turned, num_layers, (0, 1), "smollm3")
    return {"layers_without_rotary": tuple(not each for each in turned)}


def _gemma(text: Text) -> Text:
    return {"norm_offset": 1.0, "embedding_scale": text["hidden_size"] ** 0.5, "has_feed_forward_bias": False}


def _gemma2(text: Text) -> Text:
    return _gemma(text) | {
        "has_post_norms": True,
        "attention_scale": _number(text, "query_pre_attn_scalar") ** -0.5,
        "attention_cap": _number(text, "attn_logit_softcapping", can_be_absent=True),
        "logit_cap": _number(text, "final_logit_softcapping", can_be_absent=True),
    }


def _gemma3(text: Text) -> Text:
    stretching = text.get("rope_parameters") or {}
    near = {"rope_theta": text["rope_local_base_freq"]} | (stretching.get("sliding_attention") or {})
    return _gemma2(text) | {
        "has_head_norms": True,
        "attention_cap": None,  # which the authors' code ignores as well
        "window_rotary": _rotary(text, near, "gemma3_text"),
    }


def _granite(text: Text) -> Text:
    return {
        "input_scale": _number(text, "embedding_multiplier"),
        "residual_scale": _number(text, "residual_multiplier"),
        "attention_scale": _number(text, "attention_multiplier"),
        "logit_scale": 1 / _number(text, "logits_scaling"),
    }


def _without_biases(text: Text) -> Text:
    return {"has_qkv_bias": False, "has_output_bias": False, "has_feed_forward_bias": False}


OTHERS: dict[str, Callable[[Text], Text]] = {
    "mistral": _without_biases, "phi3": _without_biases, "qwen2": _qwen2, "qwen3": _qwen3, "smollm3": _smollm3,
    "gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3, "granite": _granite,
}  # fmt: skip


# ---- fields of several families ------------------------------------------------------------------------


def _tokens(text: Text, kind: str) -> Text:
    ends = text["eos_token_id"]
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    if not ends or ends == [None]:
        raise ValueError(f"there is no eos_token_id in {kind}; add it to config.json")
    for end in ends:
        check_token("eos_token_id", end, text["vocab_size"], kind)
    bos, pad = text["bos_token_id"], text["pad_token_id"]
    if bos is None:  # as in OPT, where the end token begins a text
        bos = ends[0]
    check_token("bos_token_id", bos, text["vocab_size"], kind)
    if pad is None or pad == -1:  # any will do: padding has no effect
        pad = ends[0]
    check_token("pad_token_id", pad, text["vocab_size"], kind)
    return {"bos_token_id": bos, "eos_token_id": ends[0], "end_token_ids": tuple(ends), "pad_token_id": pad}


def _windows(text: Text, kind: str) -> Text:
    """Which layers have a sliding window, and its size."""
    window, num_layers = text.get("sliding_window"), text["num_hidden_layers"]
    if window is None or text.get("use_sliding_window") is False:
        return {}
    check_value("sliding_window", window, 1, kind, (1, 2**24))
    layers = range(num_layers)
    if kind in ("mistral", "phi3"):
        types = [True] * num_layers
    elif (named := text["layer_types"]) is not None:
        _check_layers("layer_types", named, num_layers, ("sliding_attention", "full_attention"), kind)
        types = [each == "sliding_attention" for each in named]
    elif kind == "smollm3":
        types = list(_smollm3(text)["layers_without_rotary"])
    elif kind in ("gemma2", "gemma3_text"):
        pattern = text.get("sliding_window_pattern", 2)
        check_value("sliding_window_pattern", pattern, 1, kind, (1, 2**16))
        types = [(layer + 1) % pattern != 0 for layer in layers]
    else:
        first = check_value("max_window_layers", text["max_window_layers"], 1, kind, (0, 2**16))
        types = [layer >= first for layer in layers]
    return {"window": window, "window_layers": tuple(types)} if any(types) else {}


def _stretching(text: Text, kind: str) -> Text:
    """The scaling of positions, under its newer or older name; without the values for layers with a sliding window."""
    found = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_scaling is {reprlib.repr(found)} in {kind}; it should be a JSON object; {AGAIN}")
    return found.get("full_attention", found) or {}


def _rotary(text: Text, stretching: Text, kind: str) -> Rotary:
    found = {key: value for key, value in stretching.items() if value is not None}
    scaling = found.get("rope_type", found.get("type", "default"))
    if kind == "phi3" and scaling in ("su", "yarn"):
        scaling = "longrope"
    if scaling not in SCALINGS:
        raise ValueError(f"rope_type is {reprlib.repr(scaling)} in {kind}; use one of {', '.join(SCALINGS)}")
    share = found.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    check_value("partial_rotary_factor", share, 1.0, kind, (0.01, 1) if kind in ("phi3", "gpt_neox") else (1, 1))
    size = int(text["head_dim"] * share)
    if size % 2 or not size:
        raise ValueError(f"head_dim is {text['head_dim']} in {kind}, of which {size} dimensions are rotated, an odd "
            "number")
    base = float(check_value("rope_theta", found.get("rope_theta", text["rope_theta"]), 1.0, kind, (1.0001, 1e12)))
    if scaling in ("default", "dynamic"):  # identical up to max_position_embeddings, the maximum here
        return Rotary(size, base)

    def number(name: str, default: float | None = None) -> float:
        value = found.get(name, default)
        return float(check_value(name, value, 1.0, f"rope_scaling of {kind}", (1e-6, MOST_FACTOR)))

    if scaling == "linear":
        return Rotary(size, base, "linear", number("factor"))
    most = text["max_position_embeddings"]
    name = "original_max_position_embeddings"
    length = check_value(name, text.get(name) or found.get(name, most), 1, kind, BOUNDS["max_position_embeddings"])
    factor = number("factor", most / length)
    rotary = {"size": size, "base": base, "scaling": scaling, "factor": factor, "original_length": length}
    if scaling == "llama3":
        return Rotary(**rotary, slow=number("low_freq_factor"), fast=number("high_freq_factor"))
    if scaling == "yarn":
        amplitude = _amplitude(factor)
        if found.get("mscale") and found.get("mscale_all_dim"):
            amplitude = _amplitude(factor, number("mscale")) / _amplitude(factor, number("mscale_all_dim"))
        return Rotary(
            **rotary,
            slow=number("beta_slow", 1) or 1,
            fast=number("beta_fast", 32) or 32,
            is_rounded=bool(found.get("truncate", True)),
            amplitude=number("attention_factor", amplitude),
        )
    factors = found.get("short_factor")
    _check_layers("short_factor", factors, size // 2, None, kind)
    for each in factors or []:
        check_value("short_factor", each, 1.0, kind, (1e-6, MOST_FACTOR))
    amplitude = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return Rotary(**rotary, factors=tuple(map(float, factors or [])), amplitude=number("attention_factor", amplitude))


def _amplitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _check_layers(name: str, values: Any, number: int, known: tuple[Any, ...] | None, kind: str) -> None:
    is_known = isinstance(values, list | tuple) and (known is None or all(value in known for value in values))
    if not is_known or len(values) != number:
        words = f" of {' and '.join(map(repr, known))}" if known else ""
        raise ValueError(f"{name} is {reprlib.repr(values)} in {kind}; it should be a list of {number}{words}; {AGAIN}")


def _flag(text: Text, name: str, kind: str) -> bool:
    return bool(check_value(name, text[name], False, kind))


def _number(text: Text, name: str, *, can_be_absent: bool = False) -> Any:
    value = text[name]
    if value is None and can_be_absent:
        return None
    return float(check_value(name, value, 1.0, text["model_type"], (1e-6, 1e6)))
