"""The families of image encoders: literal tables of their published config.json and weight names.

Written from the published files and the reference's modules, and used by `checkpoint.encoders`. ``{}`` is the number of
a layer, ``.*`` stands for ``.weight`` and ``.bias``, ``q|k|v`` are several, as in `keys`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from blip2.checkpoint.keys import VISION, VISION_LAYER, Table


@dataclass(frozen=True)
class Family:
    """How the models of a family are stored; our names on the left, theirs on the right."""

    defaults: dict[str, Any]
    """Values of absent fields of config.json."""
    outside: Table
    layer: str
    """Prefix of a layer's weight names."""
    inside: Table
    always: dict[str, Any] = field(default_factory=dict)
    """Fields of `VisionConfig` that are the same in all models of the family."""
    begins: tuple[str, ...] = ("",)
    """Possible prefixes of all names."""
    ignored: str = "^$"
    """Names of weights outside of the encoder, as a regular expression."""
    gate: tuple[str, Table] | None = None
    """The field of config.json for a gated feed-forward layer, and its weight names."""
    scales: Table = field(default_factory=dict)
    """Layers whose output is scaled, and the scale's name."""
    biases: Table = field(default_factory=dict)
    """Suffixes of bias names, and the field of config.json that says whether they exist."""
    is_norm_of_patches: bool = True
    """Whether the last norm applies to the patches, or only to the class token."""


COMMON = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
CLIP = Family(
    COMMON | {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    {
        "class_embedding": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "patch_embedding.*": "embeddings.patch_embedding.*",
        "pre_norm.*": "pre_layrnorm.*",  # misspelt in the files
        "final_norm.*": "post_layernorm.*",
    },
    "encoder.layers.{}",
    {
        "norm1.*": "layer_norm1.*",
        "qkv.*": "self_attn.q_proj|k_proj|v_proj.*",
        "projection.*": "self_attn.out_proj.*",
        "norm2.*": "layer_norm2.*",
        "fc1.*": "mlp.fc1.*",
        "fc2.*": "mlp.fc2.*",
    },
    always={"has_patch_bias": False, "has_pre_norm": True},
    begins=("vision_model.", ""),
    ignored=r"^(embeddings\.position_ids$|visual_projection\.)",
    is_norm_of_patches=False,
)
SIGLIP = replace(
    CLIP,
    defaults=COMMON | {"hidden_act": "gelu_pytorch_tanh"},
    always={"num_prefix_tokens": 0},
    ignored=r"^(embeddings\.position_ids$|head\.)",
    is_norm_of_patches=True,
)
BERT_ATTENTION = {
    "qkv.*": "attention.attention.query|key|value.*",
    "projection.*": "attention.output.dense.*",
}
BERT_BIASES = dict.fromkeys((".query.bias", ".key.bias", ".value.bias"), "qkv_bias")
VIT = Family(
    COMMON | {"layer_norm_eps": 1e-12, "qkv_bias": True},
    {
        "class_embedding": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        "patch_embedding.*": "embeddings.patch_embeddings.projection.*",
        "final_norm.*": "layernorm.*",
    },
    "encoder.layer.{}",
    {
        "norm1.*": "layernorm_before.*",
        "norm2.*": "layernorm_after.*",
        "fc1.*": "intermediate.dense.*",
        "fc2.*": "output.dense.*",
        **BERT_ATTENTION,
    },
    begins=("", "vit."),
    ignored=r"^(embeddings\.mask_token$|pooler\.|classifier\.)",
    biases=BERT_BIASES,
)
DINO_NORMS = {"norm1.*": "norm1.*", "norm2.*": "norm2.*"}
DINO_SCALES = {"projection": "layer_scale1.lambda1", "fc2": "layer_scale2.lambda1"}
DINOV2 = Family(
    COMMON | {"patch_size": 14, "mlp_ratio": 4, "qkv_bias": True},
    VIT.outside,
    "encoder.layer.{}",
    {"fc1.*": "mlp.fc1.*", "fc2.*": "mlp.fc2.*", **DINO_NORMS, **BERT_ATTENTION},
    begins=("", "dinov2."),
    ignored=r"^(embeddings\.mask_token$|classifier\.)",
    gate=("use_swiglu_ffn", {"fc1.*": "mlp.weights_in.*", "fc2.*": "mlp.weights_out.*"}),
    scales=DINO_SCALES,
    biases=BERT_BIASES,
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    defaults=DINOV2.defaults | {"patch_size": 16, "num_register_tokens": 4},
    outside=DINOV2.outside | {"registers": "embeddings.register_tokens"},
    always={"has_smooth_resizing": True},
    begins=("", "dinov2_with_registers."),
)
DINOV3_ATTENTION = {"qkv.*": "attention.q_proj|k_proj|v_proj.*", "projection.*": "attention.o_proj.*"}
DINOV3 = Family(
    COMMON | {
        "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5,
        "rope_theta": 100.0, "num_register_tokens": 0, "query_bias": True, "key_bias": False, "value_bias": True,
        "proj_bias": True, "mlp_bias": True,
    },
    {
        "class_embedding": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "patch_embedding.*": "embeddings.patch_embeddings.*",
        "final_norm.*": "norm.*",
    },
    "layer.{}",
    {"fc1.*": "mlp.up_proj.*", "fc2.*": "mlp.down_proj.*", **DINO_NORMS, **DINOV3_ATTENTION},
    ignored=r"^embeddings\.mask_token$",
    gate=("use_gated_mlp", {"fc1.*": "mlp.gate_proj|up_proj.*", "fc2.*": "mlp.down_proj.*"}),
    scales=DINO_SCALES,
    biases={
        "q_proj.bias": "query_bias", "k_proj.bias": "key_bias", "v_proj.bias": "value_bias", "o_proj.bias": "proj_bias",
        "gate_proj.bias": "mlp_bias", "up_proj.bias": "mlp_bias", "down_proj.bias": "mlp_bias",
    },
)  # fmt: skip
# EVA-CLIP in the published models, or the encoder of another BLIP-2: read with the tables of the whole model.
BLIP2 = Family(
    {},
    {ours.removeprefix("vision."): theirs.removeprefix("vision_model.") for ours, theirs in VISION.items()},
    "encoder.layers.{}",
    {
        ours.removeprefix("vision.blocks.{}."): theirs.removeprefix("vision_model.encoder.layers.{}.")
        for ours, theirs in VISION_LAYER.items()
    },
    begins=("vision_model.", ""),
)

FAMILIES = {
    "blip-2": BLIP2,
    "blip_2_vision_model": BLIP2,
    "instructblip": BLIP2,
    "instructblip_vision_model": BLIP2,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "dinov3_vit": DINOV3,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit": VIT,
}
"""By the model_type in config.json."""
