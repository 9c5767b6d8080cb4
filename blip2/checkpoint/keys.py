"""Names of all weights: literal tables from our names to the published (Hugging Face) ones.

``{}`` is the number of a layer. ``.*`` stands for ``.weight`` and ``.bias``. ``q|k|v`` are several published tensors
that are concatenated to one here (see `published_names`). The same table serves reading and writing. Written from the
published files (``model.safetensors.index.json``) and the reference's modules.
"""

from __future__ import annotations

from blip2.checkpoint.gpts import BEFORE, TRANSPOSED, gpt_names
from blip2.config import (
    Blip2Config,
    ConvolutionalConfig,
    DecoderConfig,
    LanguageConfig,
    MatcherConfig,
    OPTConfig,
    QFormerConfig,
    T5Config,
    VisionConfig,
)

Table = dict[str, str]
Config = Blip2Config | MatcherConfig | LanguageConfig

VISION: Table = {
    "vision.class_embedding": "vision_model.embeddings.class_embedding",
    "vision.position_embedding": "vision_model.embeddings.position_embedding",
    "vision.patch_embedding.*": "vision_model.embeddings.patch_embedding.*",
    "vision.pre_norm.*": "vision_model.pre_layernorm.*",
    "vision.final_norm.*": "vision_model.final_layernorm.*",  # ours: see `VisionConfig.has_final_norm`
    "vision.post_norm.*": "vision_model.post_layernorm.*",
}
VISION_LAYER: Table = {
    "vision.blocks.{}.norm1.*": "vision_model.encoder.layers.{}.layer_norm1.*",
    "vision.blocks.{}.qkv.*": "vision_model.encoder.layers.{}.self_attn.qkv.*",
    "vision.blocks.{}.projection.*": "vision_model.encoder.layers.{}.self_attn.projection.*",
    "vision.blocks.{}.norm2.*": "vision_model.encoder.layers.{}.layer_norm2.*",
    "vision.blocks.{}.fc1.*": "vision_model.encoder.layers.{}.mlp.fc1.*",
    "vision.blocks.{}.fc2.*": "vision_model.encoder.layers.{}.mlp.fc2.*",
}
# Both names are ours: the published layout has no convolutions.
CONVOLUTIONAL: Table = {
    "vision.patch_embedding.*": "vision_model.embeddings.patch_embedding.*",
    "vision.head.*": "vision_model.head.*",
    "vision.post_norm.*": "vision_model.post_layernorm.*",
}
CONVOLUTIONAL_LAYER: Table = {
    f"vision.blocks.{{}}.{part}.*": f"vision_model.encoder.layers.{{}}.{part}.*"
    for part in ("expand", "depthwise", "project")
}

QFORMER: Table = {
    "qformer.query_tokens": "query_tokens",
    "qformer.embedding_norm.*": "qformer.layernorm.*",
}
QFORMER_TEXT: Table = {
    "qformer.word_embedding.weight": "embeddings.word_embeddings.weight",
    "qformer.position_embedding.weight": "embeddings.position_embeddings.weight",
}
# The same weights under other names, if the Q-Former of a generative model reads the prompt (InstructBLIP).
INSTRUCT: Table = {
    "qformer.embedding_norm.*": "qformer.embeddings.layernorm.*",
    "qformer.word_embedding.weight": "qformer.embeddings.word_embeddings.weight",
    "qformer.position_embedding.weight": "qformer.embeddings.position_embeddings.weight",
}
QFORMER_LAYER: Table = {
    "qformer.layers.{}.self_attention.query.*": "qformer.encoder.layer.{}.attention.attention.query.*",
    "qformer.layers.{}.self_attention.key.*": "qformer.encoder.layer.{}.attention.attention.key.*",
    "qformer.layers.{}.self_attention.value.*": "qformer.encoder.layer.{}.attention.attention.value.*",
    "qformer.layers.{}.self_attention.output.*": "qformer.encoder.layer.{}.attention.output.dense.*",
    "qformer.layers.{}.self_attention.norm.*": "qformer.encoder.layer.{}.attention.output.LayerNorm.*",
    "qformer.layers.{}.query_feed_forward.intermediate.*": "qformer.encoder.layer.{}.intermediate_query.dense.*",
    "qformer.layers.{}.query_feed_forward.output.*": "qformer.encoder.layer.{}.output_query.dense.*",
    "qformer.layers.{}.query_feed_forward.norm.*": "qformer.encoder.layer.{}.output_query.LayerNorm.*",
}
QFORMER_CROSS_LAYER: Table = {
    "qformer.layers.{}.cross_attention.query.*": "qformer.encoder.layer.{}.crossattention.attention.query.*",
    "qformer.layers.{}.cross_attention.key.*": "qformer.encoder.layer.{}.crossattention.attention.key.*",
    "qformer.layers.{}.cross_attention.value.*": "qformer.encoder.layer.{}.crossattention.attention.value.*",
    "qformer.layers.{}.cross_attention.output.*": "qformer.encoder.layer.{}.crossattention.output.dense.*",
    "qformer.layers.{}.cross_attention.norm.*": "qformer.encoder.layer.{}.crossattention.output.LayerNorm.*",
}
QFORMER_TEXT_LAYER: Table = {
    "qformer.layers.{}.text_feed_forward.intermediate.*": "qformer.encoder.layer.{}.intermediate.dense.*",
    "qformer.layers.{}.text_feed_forward.output.*": "qformer.encoder.layer.{}.output.dense.*",
    "qformer.layers.{}.text_feed_forward.norm.*": "qformer.encoder.layer.{}.output.LayerNorm.*",
}

PROJECTION: Table = {"projection.*": "language_projection.*"}

OPT: Table = {
    "language.token_embedding.weight": "language_model.model.decoder.embed_tokens.weight",
    "language.position_embedding.weight": "language_model.model.decoder.embed_positions.weight",
    "language.final_norm.*": "language_model.model.decoder.final_layer_norm.*",
}
OPT_LAYER: Table = {
    "language.blocks.{}.attention_norm.*": "language_model.model.decoder.layers.{}.self_attn_layer_norm.*",
    "language.blocks.{}.qkv.*": "language_model.model.decoder.layers.{}.self_attn.q_proj|k_proj|v_proj.*",
    "language.blocks.{}.output.*": "language_model.model.decoder.layers.{}.self_attn.out_proj.*",
    "language.blocks.{}.feed_forward_norm.*": "language_model.model.decoder.layers.{}.final_layer_norm.*",
    "language.blocks.{}.fc1.*": "language_model.model.decoder.layers.{}.fc1.*",
    "language.blocks.{}.fc2.*": "language_model.model.decoder.layers.{}.fc2.*",
}

T5: Table = {
    "language.token_embedding.weight": "language_model.shared.weight",
    "language.encoder_norm.weight": "language_model.encoder.final_layer_norm.weight",
    "language.decoder_norm.weight": "language_model.decoder.final_layer_norm.weight",
    "language.output.weight": "language_model.lm_head.weight",
    "language.encoder_bias.table.weight": "language_model.encoder.block.0.layer.0.SelfAttention"
    ".relative_attention_bias.weight",
    "language.decoder_bias.table.weight": "language_model.decoder.block.0.layer.0.SelfAttention"
    ".relative_attention_bias.weight",
}
T5_ENCODER_LAYER: Table = {
    "language.encoder.{}.self_attention.norm.weight": "language_model.encoder.block.{}.layer.0.layer_norm.weight",
    "language.encoder.{}.self_attention.qkv.weight": "language_model.encoder.block.{}.layer.0.SelfAttention.q|k|v.weight",
    "language.encoder.{}.self_attention.output.weight": "language_model.encoder.block.{}.layer.0.SelfAttention.o.weight",
    "language.encoder.{}.feed_forward.norm.weight": "language_model.encoder.block.{}.layer.1.layer_norm.weight",
    "language.encoder.{}.feed_forward.gate_up.weight": "language_model.encoder.block.{}.layer.1.DenseReluDense.wi_0|wi_1.weight",
    "language.encoder.{}.feed_forward.down.weight": "language_model.encoder.block.{}.layer.1.DenseReluDense.wo.weight",
}
T5_DECODER_LAYER: Table = {
    "language.decoder.{}.self_attention.norm.weight": "language_model.decoder.block.{}.layer.0.layer_norm.weight",
    "language.decoder.{}.self_attention.qkv.weight": "language_model.decoder.block.{}.layer.0.SelfAttention.q|k|v.weight",
    "language.decoder.{}.self_attention.output.weight": "language_model.decoder.block.{}.layer.0.SelfAttention.o.weight",
    "language.decoder.{}.cross_attention.norm.weight": "language_model.decoder.block.{}.layer.1.layer_norm.weight",
    "language.decoder.{}.cross_attention.query.weight": "language_model.decoder.block.{}.layer.1.EncDecAttention.q.weight",
    "language.decoder.{}.cross_attention.key_value.weight": "language_model.decoder.block.{}.layer.1.EncDecAttention.k|v.weight",
    "language.decoder.{}.cross_attention.output.weight": "language_model.decoder.block.{}.layer.1.EncDecAttention.o.weight",
    "language.decoder.{}.feed_forward.norm.weight": "language_model.decoder.block.{}.layer.2.layer_norm.weight",
    "language.decoder.{}.feed_forward.gate_up.weight": "language_model.decoder.block.{}.layer.2.DenseReluDense.wi_0|wi_1.weight",
    "language.decoder.{}.feed_forward.down.weight": "language_model.decoder.block.{}.layer.2.DenseReluDense.wo.weight",
}

DECODER: Table = {
    "language.token_embedding.weight": "language_model.model.embed_tokens.weight",
    "language.final_norm.weight": "language_model.model.norm.weight",
    "language.output.weight": "language_model.lm_head.weight",
}
DECODER_LAYER: Table = {
    "language.blocks.{}.attention_norm.weight": "language_model.model.layers.{}.input_layernorm.weight",
    "language.blocks.{}.qkv.*": "language_model.model.layers.{}.self_attn.q_proj|k_proj|v_proj.*",
    "language.blocks.{}.query_norm.weight": "language_model.model.layers.{}.self_attn.q_norm.weight",
    "language.blocks.{}.key_norm.weight": "language_model.model.layers.{}.self_attn.k_norm.weight",
    "language.blocks.{}.output.*": "language_model.model.layers.{}.self_attn.o_proj.*",
    "language.blocks.{}.feed_forward_norm.weight": "language_model.model.layers.{}.post_attention_layernorm.weight",
    "language.blocks.{}.gate_up.*": "language_model.model.layers.{}.mlp.gate_proj|up_proj.*",
    "language.blocks.{}.down.*": "language_model.model.layers.{}.mlp.down_proj.*",
}
DECODER_POST_NORMS: Table = {  # Llama uses the second name for another norm
    "language.blocks.{}.attention_post_norm.weight": "language_model.model.layers.{}.post_attention_layernorm.weight",
    "language.blocks.{}.feed_forward_norm.weight": "language_model.model.layers.{}.pre_feedforward_layernorm.weight",
    "language.blocks.{}.feed_forward_post_norm.weight": "language_model.model.layers.{}.post_feedforward_layernorm.weight",
}
FUSED_IN_FILES = ("phi3",)
FUSED_LAYER: Table = {  # one tensor in the files as well
    "language.blocks.{}.qkv.weight": "language_model.model.layers.{}.self_attn.qkv_proj.weight",
    "language.blocks.{}.gate_up.weight": "language_model.model.layers.{}.mlp.gate_up_proj.weight",
}

MATCHER: Table = {
    "vision_projection.*": "vision_projection.*",
    "text_projection.*": "text_projection.*",
    "itm_head.*": "itm_head.*",
}
# Absent from the published files, although the authors' files have them. Without the temperature similarities are not
# calibrated, and without the head the Q-Former cannot generate captions. Stored under names of our own.
MATCHER_EXTRA: Table = {
    "temperature": "temp",
    "lm_head.dense.*": "qformer_lm_head.transform.dense.*",
    "lm_head.norm.*": "qformer_lm_head.transform.LayerNorm.*",
    "lm_head.decoder_bias": "qformer_lm_head.bias",
}

# The same tensor under other published names: read if the first is absent, otherwise ignored.
ALIASES: dict[str, tuple[str, ...]] = {
    "language_model.model.decoder.embed_tokens.weight": ("language_model.lm_head.weight",),
    "language_model.shared.weight": (
        "language_model.encoder.embed_tokens.weight",
        "language_model.decoder.embed_tokens.weight",
    ),
    # Inferred, not seen: the published blip2-itm-vit-g is larger than its weights by exactly these two tables.
    "embeddings.word_embeddings.weight": ("qformer.embeddings.word_embeddings.weight",),
    "embeddings.position_embeddings.weight": ("qformer.embeddings.position_embeddings.weight",),
}
# Buffers of older files, which are not weights.
IGNORED = ("embeddings.position_ids", "qformer.embeddings.position_ids")
IGNORED_ENDS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
LANGUAGE = "language_model."


def aliases(config: Config) -> dict[str, tuple[str, ...]]:
    """Other published names of the same tensor, for this configuration."""
    language = config.language if isinstance(config, Blip2Config) else config
    found = dict(ALIASES)
    if isinstance(language, DecoderConfig):
        names = _decoder(language)
        head = "language_model.lm_head.weight"
        if language.is_tied:
            found[names["language.token_embedding.weight"]] = (head,)
        found[head] = ("language_model.embed_out.weight",)  # of GPT-NeoX
        before = LANGUAGE + BEFORE.get(language.model_type, "model.")
        for name in (each for theirs in names.values() for each in published_names(theirs)):
            if name.startswith(before):  # absent from the files of a bare model
                found[name] = (*found.get(name, ()), LANGUAGE + name.removeprefix(before))
    if isinstance(config, Blip2Config | MatcherConfig):
        return found
    return {_without_prefix(name): tuple(map(_without_prefix, others)) for name, others in found.items()}


def is_transposed(config: Config, ours: str) -> bool:
    """Whether a weight is ``[inputs, outputs]`` in the files."""
    language = config.language if isinstance(config, Blip2Config) else config
    ends = TRANSPOSED.get(language.model_type, ()) if isinstance(language, DecoderConfig) else ()
    return ours.startswith("language.blocks.") and ours.endswith(ends)


def is_ignored(name: str) -> bool:
    """Whether a tensor of the files is not a weight."""
    return name in IGNORED or name.endswith(IGNORED_ENDS)


def table(config: Config) -> Table:
    """Our parameter names to the published ones for this configuration, in full; for a language model alone those of
    its own files."""
    if not isinstance(config, Blip2Config | MatcherConfig):
        return {ours: _without_prefix(theirs) for ours, theirs in _language(config).items()}
    full = image_encoder_table(config.vision) | _qformer(config.qformer)
    if isinstance(config, Blip2Config):
        full |= _expand(INSTRUCT) if config.reads_prompt else {}
        return full | _expand(PROJECTION) | _language(config.language)
    return full | _expand(MATCHER) | (_expand(MATCHER_EXTRA) if config.has_lm_head else {})


def rows_of_parts(config: Config, ours: str, num_rows: int, num_parts: int) -> list[int]:
    """Row counts of the published tensors that are concatenated to ``num_rows`` rows here."""
    language = config.language if isinstance(config, Blip2Config) else config
    if isinstance(language, DecoderConfig) and ours.split(".")[-2] == "qkv" and num_parts == 3:
        size = num_rows // (language.num_heads + 2 * language.num_key_value_heads)
        return [size * heads for heads in (language.num_heads, *[language.num_key_value_heads] * 2)]
    return [num_rows // num_parts] * num_parts


def published_names(theirs: str) -> list[str]:
    """The names in the files for a name of the table: ``"a.q|k|v.weight"`` is three tensors, in this order."""
    before, bar, after = theirs.partition("|")
    if not bar:
        return [theirs]
    start, first = before.rsplit(".", 1)
    others, end = after.rsplit(".", 1)
    return [f"{start}.{part}.{end}" for part in (first, *others.split("|"))]


def image_encoder_table(config: VisionConfig | ConvolutionalConfig) -> Table:
    """As `table`, for the image encoder alone."""
    if isinstance(config, ConvolutionalConfig):
        return _convolutional(config)
    names = _expand(VISION) | _expand(VISION_LAYER, range(config.num_layers))
    if not config.has_patch_bias:
        del names["vision.patch_embedding.bias"]
    if not config.has_pre_norm:
        del names["vision.pre_norm.weight"], names["vision.pre_norm.bias"]
    if not config.has_final_norm:
        del names["vision.final_norm.weight"], names["vision.final_norm.bias"]
    return names


def _convolutional(config: ConvolutionalConfig) -> Table:
    names = _expand(CONVOLUTIONAL) | _expand(CONVOLUTIONAL_LAYER, range(config.num_layers))
    for absent in ("vision.blocks.0.expand", *([] if config.has_head else ["vision.head"])):
        del names[f"{absent}.weight"], names[f"{absent}.bias"]
    return names


def _qformer(config: QFormerConfig) -> Table:
    layers = range(config.num_layers)
    names = _expand(QFORMER) | _expand(QFORMER_LAYER, layers)
    names |= _expand(QFORMER_CROSS_LAYER, layers[:: config.cross_attention_frequency])
    if config.has_text:
        names |= _expand(QFORMER_TEXT) | _expand(QFORMER_TEXT_LAYER, layers)
    return names


def _language(config: LanguageConfig) -> Table:
    if isinstance(config, OPTConfig):
        return _expand(OPT) | _expand(OPT_LAYER, range(config.num_layers))
    if isinstance(config, DecoderConfig):
        return _decoder(config)
    return _t5(config)


def _t5(config: T5Config) -> Table:
    encoder, decoder = range(config.num_layers), range(config.num_decoder_layers)
    names = _expand(T5) | _expand(T5_ENCODER_LAYER, encoder) | _expand(T5_DECODER_LAYER, decoder)
    if not config.has_gate:
        names = {
            ours.replace(".gate_up.", ".up."): theirs.replace(".wi_0|wi_1.", ".wi.") for ours, theirs in names.items()
        }
    if config.has_bias_in_each_layer:
        for part, layers in (("encoder", encoder), ("decoder", decoder)):
            theirs = names.pop(f"language.{part}_bias.table.weight")
            for layer in layers:
                ours = f"language.{part}.{layer}.self_attention.bias.table.weight"
                names[ours] = theirs.replace(".0.layer.", f".{layer}.layer.")
    return names


def _decoder(config: DecoderConfig) -> Table:
    layers = range(config.num_layers)
    once, layer = gpt_names(config) if config.make == "gpt" else (DECODER, DECODER_LAYER)
    names = _expand(once) | _expand(layer, layers)
    if config.has_post_norms:
        names |= _expand(DECODER_POST_NORMS, layers)
    if config.model_type in FUSED_IN_FILES:
        names |= _expand(FUSED_LAYER, layers)
    absent = {
        "language.output.weight": config.is_tied,
        ".qkv.bias": not config.has_qkv_bias,
        ".output.bias": not config.has_output_bias,
        ".gate_up.bias": not config.has_feed_forward_bias,
        ".down.bias": not config.has_feed_forward_bias,
        ".query_norm.weight": not config.has_head_norms,
        ".key_norm.weight": not config.has_head_norms,
    }
    ends = tuple(end for end, is_absent in absent.items() if is_absent)
    return {ours: theirs for ours, theirs in names.items() if not ours.endswith(ends)}


def _without_prefix(theirs: str) -> str:
    """The name in the files of a language model alone."""
    return theirs.removeprefix(LANGUAGE)


def _expand(names: Table, layers: range | None = None) -> Table:
    """Expand ``{}`` for every layer, and ``.*`` for weight and bias."""
    full: Table = {}
    for ours, theirs in names.items():
        for ending in ("weight", "bias") if ours.endswith(".*") else ("",):
            pair = (ours.replace(".*", f".{ending}"), theirs.replace(".*", f".{ending}"))
            for layer in layers if layers is not None else (0,):
                full[pair[0].format(layer)] = pair[1].format(layer)
    return full
