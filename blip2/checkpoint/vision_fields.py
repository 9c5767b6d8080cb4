"""The image encoder in ``config.json``: published fields, our own fields, and checks.

Each row: our field, the field in the file, and the value of an absent one.
"""

from __future__ import annotations

import reprlib
from typing import Any

from blip2.checkpoint.bounds import AGAIN, BOUNDS, check_value
from blip2.config import ConvolutionalConfig, VisionConfig

Fields = tuple[tuple[str, str, Any], ...]

VISION: Fields = (
    ("hidden_size", "hidden_size", 1408),
    ("num_layers", "num_hidden_layers", 39),
    ("num_heads", "num_attention_heads", 16),
    ("intermediate_size", "intermediate_size", 6144),
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 14),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("activation", "hidden_act", "gelu"),
    ("has_patch_bias", "patch_bias", True),  # ours: the published layout has no CLIP L/14
    ("has_pre_norm", "pre_layernorm", False),  # ours, likewise
)
# Our own fields, written only if they differ: for encoders that the published layout cannot express.
VISION_EXTRA: Fields = (
    ("num_prefix_tokens", "num_prefix_tokens", 1),
    ("keeps_class_token", "keeps_class_token", True),
    ("has_gate", "gated_mlp", False),
    ("rotary_base", "rope_theta", 0.0),
    ("has_final_norm", "final_layernorm", False),
    ("has_smooth_resizing", "antialiased_positions", False),
)

CONVOLUTIONAL = "blip2_convolutional_encoder"
"""model_type of a convolutional image encoder: ours, like all of its fields."""
SIZES = ("widths", "depths")


def vision_json(vision: VisionConfig | ConvolutionalConfig, *, is_instruct: bool) -> dict[str, Any]:
    """The image encoder's section of ``config.json``; ``is_instruct``: in an InstructBLIP."""
    if isinstance(vision, ConvolutionalConfig):
        return {"model_type": CONVOLUTIONAL, "hidden_size": vision.hidden_size, **vars(vision)}
    extra = extra_fields(vision)
    # With these fields it is not an image encoder of the published layout, and other programs should notice.
    kind = f"{'instructblip' if is_instruct else 'blip_2'}_vision_model" if not extra else "blip2_vision_transformer"
    return {"model_type": kind, "qkv_bias": True} | {
        theirs: getattr(vision, ours) for ours, theirs, _ in (*VISION, *extra)
    }


def parse_convolutional(section: dict[str, Any]) -> ConvolutionalConfig:
    """The convolutional image encoder in a vision_config; ValueError for unsupported features."""
    values: dict[str, Any] = {}
    for name, like in vars(ConvolutionalConfig()).items():
        value = section.get(name, like)
        if name in SIZES:
            if not isinstance(value, list | tuple) or len(value) != len(like):
                raise ValueError(
                    f"{name} is {reprlib.repr(value)} in vision_config; it should be {len(like)} numbers, such as "
                    f"{list(like)}; {AGAIN}"
                )
            bounds = BOUNDS["hidden_size" if name == "widths" else "num_layers"]
            value = tuple(check_value(name, number, 1, "vision_config", bounds) for number in value)
        else:
            check_value(name, value, like, "vision_config", BOUNDS.get(name))
        values[name] = value
    return ConvolutionalConfig(**values)


def extra_fields(vision: VisionConfig | ConvolutionalConfig) -> Fields:
    """The fields of an image encoder that the published layout lacks."""
    if isinstance(vision, ConvolutionalConfig):
        return tuple((name, name, like) for name, like in vars(ConvolutionalConfig()).items())
    return tuple(row for row in VISION_EXTRA if getattr(vision, row[0]) != row[2])


def check_vision(vision: VisionConfig) -> None:
    """Raises ValueError for sizes that do not fit together."""
    if vision.patch_size > vision.image_size:
        raise ValueError(
            f"patch_size is {vision.patch_size} in vision_config, more than the image_size {vision.image_size}; {AGAIN}"
        )
    if vision.activation == "silu" and not vision.has_gate:
        raise ValueError("hidden_act is 'silu' in vision_config; it is supported only with a gate (gated_mlp)")
    if vision.rotary_base and vision.hidden_size // vision.num_heads % 4:
        raise ValueError(
            f"num_attention_heads is {vision.num_heads} in vision_config: heads of "
            f"{vision.hidden_size // vision.num_heads} dimensions cannot have rotary positions in two directions "
            f"(rope_theta); {AGAIN}"
        )
