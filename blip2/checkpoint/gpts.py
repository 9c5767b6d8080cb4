"""GPT-2, GPT-NeoX (Pythia) and BLOOM: their published configurations, and the names of their weights."""

from __future__ import annotations

import reprlib
from typing import Any

from blip2.checkpoint.bounds import AGAIN, BOUNDS, check_names, check_value
from blip2.config import DecoderConfig

Text = dict[str, Any]

# Values of absent fields, as in transformers.
DEFAULTS: dict[str, Text] = {
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256,
        "pad_token_id": None, "tie_word_embeddings": True, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    },
    "gpt_neox": {
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
        "use_parallel_residual": True, "attention_bias": True, "rotary_pct": 0.25, "rotary_emb_base": 10_000.0,
    },
    "bloom": {
        "vocab_size": 250880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": True, "seq_length": 2048,
        "apply_residual_connection_post_layernorm": False,
    },
}  # fmt: skip
# Synonyms, and features with only one supported value.
SYNONYMS = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
FIXED = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "gpt_neox": {},
    "bloom": {"apply_residual_connection_post_layernorm": False},
}
SIZES = {
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "layer_norm_epsilon"),
    "gpt_neox": (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "layer_norm_eps",
    ),
    "bloom": ("vocab_size", "hidden_size", "n_layer", "n_head", "intermediate", "seq_length", "layer_norm_epsilon"),
}  # fmt: skip
OURS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_position_embeddings", "norm_eps",
)  # fmt: skip
"""Our names for those in `SIZES`, in the same order."""

BEFORE = {"gpt2": "transformer.", "bloom": "transformer.", "gpt_neox": "gpt_neox."}
"""Prefix of all names but the head's; the files of a bare GPT-2 or BLOOM lack it."""
NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight", "final_norm.*": "ln_f.*",
    },
    "gpt_neox": {"token_embedding.weight": "embed_in.weight", "final_norm.*": "final_layer_norm.*"},
    "bloom": {
        "token_embedding.weight": "word_embeddings.weight", "embedding_norm.*": "word_embeddings_layernorm.*",
        "final_norm.*": "ln_f.*",
    },
}  # fmt: skip
LAYER_NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "attention_norm.*": "h.{}.ln_1.*", "qkv.*": "h.{}.attn.c_attn.*", "output.*": "h.{}.attn.c_proj.*",
        "feed_forward_norm.*": "h.{}.ln_2.*", "fc1.*": "h.{}.mlp.c_fc.*", "fc2.*": "h.{}.mlp.c_proj.*",
    },
    "gpt_neox": {
        "attention_norm.*": "layers.{}.input_layernorm.*", "qkv.*": "layers.{}.attention.query_key_value.*",
        "output.*": "layers.{}.attention.dense.*", "feed_forward_norm.*": "layers.{}.post_attention_layernorm.*",
        "fc1.*": "layers.{}.mlp.dense_h_to_4h.*", "fc2.*": "layers.{}.mlp.dense_4h_to_h.*",
    },
    "bloom": {
        "attention_norm.*": "h.{}.input_layernorm.*", "qkv.*": "h.{}.self_attention.query_key_value.*",
        "output.*": "h.{}.self_attention.dense.*", "feed_forward_norm.*": "h.{}.post_attention_layernorm.*",
        "fc1.*": "h.{}.mlp.dense_h_to_4h.*", "fc2.*": "h.{}.mlp.dense_4h_to_h.*",
    },
}  # fmt: skip
TRANSPOSED = {"gpt2": (".qkv.weight", ".output.weight", ".fc1.weight", ".fc2.weight")}
"""Weights that are ``[inputs, outputs]`` in the files."""


def gpt_values(published: Text) -> tuple[Text, Text]:
    """The values that all decoders have, for `DecoderConfig`, and the fields with defaults filled in."""
    kind = published["model_type"]
    named = {SYNONYMS.get(name, name) if kind == "bloom" else name: value for name, value in published.items()}
    text = DEFAULTS[kind] | named
    check_names(published, {*DEFAULTS[kind], *(SYNONYMS if kind == "bloom" else ())}, kind)
    for name, wanted in FIXED[kind].items():
        if text[name] != wanted:
            raise ValueError(f"{name} is {reprlib.repr(text[name])} in {kind}; only {wanted!r} is supported")
    values: Text = {}
    for ours, theirs in zip(OURS, SIZES[kind], strict=True):
        value = text.get(theirs)
        if ours == "intermediate_size" and value is None:
            value = 4 * values["hidden_size"]
        values[ours] = check_value(theirs, value, 1.0 if ours == "norm_eps" else 1, kind, BOUNDS[ours])
    if values["hidden_size"] % values["num_heads"]:
        raise ValueError(
            f"the number of heads is {values['num_heads']} in {kind}, which does not divide the width "
            f"{values['hidden_size']}; {AGAIN}"
        )
    text["head_dim"] = values["hidden_size"] // values["num_heads"]
    text["partial_rotary_factor"], text["rope_theta"] = text.get("rotary_pct"), text.get("rotary_emb_base")
    has_bias = check_value("attention_bias", text.get("attention_bias", True), True, kind)
    return text, values | {
        "make": "gpt",
        "num_key_value_heads": values["num_heads"],
        "head_size": text["head_dim"],
        "has_qkv_bias": has_bias,
        "has_output_bias": has_bias,
        "positions": {"gpt2": "learned", "gpt_neox": "rotary", "bloom": "slopes"}[kind],
        "is_interleaved": kind != "gpt2",
        "is_parallel": check_value("use_parallel_residual", text.get("use_parallel_residual", False), True, kind),
        "has_embedding_norm": kind == "bloom",
    }


def gpt_names(config: DecoderConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Our names to those in files, for single weights and for the weights of a layer."""
    kind, before = config.model_type, BEFORE[config.model_type]
    once = {f"language.{ours}": f"language_model.{before}{theirs}" for ours, theirs in NAMES[kind].items()}
    layer = {
        f"language.blocks.{{}}.{ours}": f"language_model.{before}{theirs}" for ours, theirs in LAYER_NAMES[kind].items()
    }
    return once | {"language.output.weight": "language_model.lm_head.weight"}, layer
