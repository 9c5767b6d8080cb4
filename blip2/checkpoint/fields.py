"""Field names of published configurations: literal tables.

Each row: our field, the published field, and the value of an absent one: the reference's own default, since newer
revisions write only differences from it.
"""

from __future__ import annotations

from typing import Any

from blip2.checkpoint.vision_fields import Fields
from blip2.vision import ACTIVATIONS

Fixed = tuple[tuple[str, tuple[Any, ...], Any], ...]

QFORMER: Fields = (
    ("hidden_size", "hidden_size", 768),
    ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12),
    ("intermediate_size", "intermediate_size", 3072),
    ("cross_attention_frequency", "cross_attention_frequency", 2),
    ("layer_norm_eps", "layer_norm_eps", 1e-12),
    ("dropout", "hidden_dropout_prob", 0.1),
    ("vocab_size", "vocab_size", 30522),
    ("max_position_embeddings", "max_position_embeddings", 512),
    ("has_text", "use_qformer_text_input", False),
)
OPT: Fields = (
    ("vocab_size", "vocab_size", 50272),
    ("hidden_size", "hidden_size", 768),
    ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12),
    ("intermediate_size", "ffn_dim", 3072),
    ("max_position_embeddings", "max_position_embeddings", 2048),
    ("bos_token_id", "bos_token_id", 2),
    ("eos_token_id", "eos_token_id", 2),
    ("pad_token_id", "pad_token_id", 1),
)
T5: Fields = (
    ("vocab_size", "vocab_size", 32128),
    ("hidden_size", "d_model", 512),
    ("head_size", "d_kv", 64),
    ("num_layers", "num_layers", 6),
    ("num_decoder_layers", "num_decoder_layers", 6),  # equal to num_layers, if that is given
    ("num_heads", "num_heads", 8),
    ("intermediate_size", "d_ff", 2048),
    ("num_buckets", "relative_attention_num_buckets", 32),
    ("max_distance", "relative_attention_max_distance", 128),
    ("layer_norm_eps", "layer_norm_epsilon", 1e-6),
    ("decoder_start_token_id", "decoder_start_token_id", 0),
    ("eos_token_id", "eos_token_id", 1),
    ("pad_token_id", "pad_token_id", 0),
)

# Features with only one supported value: the published field, the accepted values, the value of an absent one. Any
# other value would load and give wrong answers.
FIXED: dict[str, Fixed] = {
    "vision_config": (("hidden_act", tuple(ACTIVATIONS), "gelu"), ("qkv_bias", (True,), True)),
    "qformer_config": (("hidden_act", ("gelu",), "gelu"), ("position_embedding_type", ("absolute",), "absolute")),
    "opt": (
        ("activation_function", ("relu",), "relu"),
        ("do_layer_norm_before", (True,), True),
        ("_remove_final_layer_norm", (False,), False),
        ("enable_bias", (True,), True),
        ("layer_norm_elementwise_affine", (True,), True),
    ),
    "t5": (
        ("feed_forward_proj", ("gated-gelu", "gated-relu", "gated-silu", "gelu", "relu", "silu"), "relu"),
        ("dense_act_fn", ("gelu", "gelu_new", "relu", "silu"), "gelu_new"),
        ("tie_word_embeddings", (True, False), True),
        ("scale_decoder_outputs", (True, False), True),
    ),
}

# Values of absent fields for mT5 and UMT5 that differ from T5's.
MT5: dict[str, Any] = {
    "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
