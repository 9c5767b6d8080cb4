"""The values recorded from the authors' code (stage 1, a small model), and the model that they were recorded from."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from blip2.config import MatcherConfig, QFormerConfig, VisionConfig
from blip2.model import Blip2Matcher

GOLDEN = Path(__file__).parent / "golden" / "lavis_stage1.safetensors"
# Names of the authors' code, longest first where one contains another, to ours.
OURS = (
    ("Qformer.bert.embeddings.word_embeddings", "qformer.word_embedding"),
    ("Qformer.bert.embeddings.position_embeddings", "qformer.position_embedding"),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.embedding_norm"),
    ("Qformer.bert.encoder.layer.", "qformer.layers."),
    ("Qformer.cls.predictions.transform.dense", "lm_head.dense"),
    ("Qformer.cls.predictions.transform.LayerNorm", "lm_head.norm"),
    ("Qformer.cls.predictions.bias", "lm_head.decoder_bias"),
    ("query_tokens", "qformer.query_tokens"),
    ("ln_vision.", "vision.post_norm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("crossattention.self", "cross_attention"),
    ("crossattention.output.dense", "cross_attention.output"),
    ("crossattention.output.LayerNorm", "cross_attention.norm"),
    (".attention.self", ".self_attention"),
    (".attention.output.dense", ".self_attention.output"),
    (".attention.output.LayerNorm", ".self_attention.norm"),
    (".intermediate_query.dense", ".query_feed_forward.intermediate"),
    (".output_query.dense", ".query_feed_forward.output"),
    (".output_query.LayerNorm", ".query_feed_forward.norm"),
    (".intermediate.dense", ".text_feed_forward.intermediate"),
    (".output.dense", ".text_feed_forward.output"),
    (".output.LayerNorm", ".text_feed_forward.norm"),
)
TIED = {"lm_head.decoder.bias", "lm_head.decoder.weight"}


def our_name(name):
    if name == "temp":
        return "temperature"
    if name.startswith("Qformer.cls.predictions.decoder"):
        return name.replace("Qformer.cls.predictions", "lm_head")
    for theirs, ours in OURS:
        name = name.replace(theirs, ours)
    return name


def recorded():
    """Tensors by name, and the configuration."""
    with safe_open(GOLDEN, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return values, json.loads(file.metadata()["config"])


def recorded_model(values, config):
    """The recorded model. Its image encoder was left out of the recording, and so it is an empty one here."""
    qformer = QFormerConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        encoder_hidden_size=config["vision_width"],
        cross_attention_frequency=config["cross_attention_frequency"],
        layer_norm_eps=config["layer_norm_eps"],
        num_query_tokens=config["num_query_tokens"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        dropout=0.0,
        has_text=True,
    )
    vision = VisionConfig(
        hidden_size=config["vision_width"], num_layers=0, num_heads=1, intermediate_size=1, layer_norm_eps=1e-5
    )
    model = Blip2Matcher(
        MatcherConfig(
            vision=vision,
            qformer=qformer,
            projection_size=config["embed_dim"],
            bos_token_id=config["bos_token_id"],
        )
    )
    weights = {
        our_name(name.removeprefix("weights.")): value for name, value in values.items() if name.startswith("weights.")
    }
    assert torch.equal(weights["lm_head.decoder.weight"], weights["qformer.word_embedding.weight"])
    missing, unexpected = model.load_state_dict(
        {name: value for name, value in weights.items() if name not in TIED}, strict=False
    )
    assert not unexpected and all(name.startswith("vision.") for name in missing)
    assert not any(name.startswith("vision.post_norm") for name in missing)
    model.freeze_pretrained()
    return model
