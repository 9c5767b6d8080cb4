"""Reads and writes ``config.json`` and related files, with the tables of `blip2.checkpoint.fields`."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from blip2.checkpoint.bounds import (
    AGAIN,
    BOUNDS,
    MOST_TOKENS,
    check_names,
    check_token,
    check_value,
    differs_in_a_bit,
)
from blip2.checkpoint.decoders import KINDS, parse_decoder
from blip2.checkpoint.fields import FIXED, MT5, OPT, QFORMER, T5
from blip2.checkpoint.vision_fields import (
    CONVOLUTIONAL,
    VISION,
    VISION_EXTRA,
    Fields,
    check_vision,
    parse_convolutional,
    vision_json,
)
from blip2.config import (
    Blip2Config,
    DecoderConfig,
    LanguageConfig,
    MatcherConfig,
    OPTConfig,
    QFormerConfig,
    T5Config,
    VisionConfig,
)
from blip2.errors import CheckpointError
from blip2.plaintext import read_text
from blip2.quantized import GROUP_SIZES

T5S = ("t5", "mt5", "umt5")
LANGUAGES = ("opt", *T5S, *KINDS)
"""The families of language models, by the model_type in config.json."""
QUANTIZATION_METHOD = "blip2"
QUANTIZED_BITS = (4, 8)
BLIP2, INSTRUCT = MODEL_TYPES = ("blip-2", "instructblip")
QUANTIZED_PARTS = ("language", "vision")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `CheckpointError` that names it."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: there is no {path.name}; is it the folder of a model?") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read ({reason}); fetch the file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; fetch the file again")
    return content


def read_config(folder: Path) -> Blip2Config | MatcherConfig:
    """The configuration of the model in a folder, generative or matching by its architecture."""
    path = folder / "config.json"
    content = read_json(path)
    if content.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type is {reprlib.repr(content.get('model_type'))}, not 'blip-2' or 'instructblip'; this is "
            "another kind of model"
        )
    read_quantization(folder)
    try:
        return parse(content if content["model_type"] == BLIP2 else _with_tokens_of_tokenizer(content, folder))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_language(folder: Path) -> LanguageConfig:
    """The configuration of a language model alone, as published in a folder.

    Its end tokens are in generation_config.json, if there is one.
    """
    path = folder / "config.json"
    content = read_json(path)
    read_quantization(folder)
    generation = folder / "generation_config.json"
    if generation.exists() and (ends := read_json(generation).get("eos_token_id")) is not None:
        content["eos_token_id"] = ends
    try:
        return _parse_language(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """How the weights in a folder are quantised: ``bits``, ``group_size``, ``parts`` and optionally ``images`` (see
    `Quantization`); None if they are not.

    Raises `CheckpointError` for other programs' formats and incomplete descriptions.
    """
    path = folder / "config.json"
    content = read_json(path).get("quantization_config")
    if content is None:
        return None
    method = content.get("quant_method") if isinstance(content, dict) else content
    if method != QUANTIZATION_METHOD:
        raise CheckpointError(
            f"{path}: the weights are quantised by {str(method or 'another program')!r}, which is not supported; load "
            "the published model and quantise it here"
        )
    bits, group_size, parts = (content.get(key) for key in ("bits", "group_size", "parts"))
    is_sized = isinstance(bits, int) and isinstance(group_size, int) and group_size in GROUP_SIZES
    images = content.get("images", False)
    is_known = isinstance(parts, list) and all(part in QUANTIZED_PARTS for part in parts)
    is_known = is_known and isinstance(images, bool) and (bool(parts) or images) and not (images and "vision" in parts)
    if bits not in QUANTIZED_BITS or not is_sized or not is_known:
        raise CheckpointError(
            f"{path}: quantization_config is {reprlib.repr(content)}; it needs bits (4 or 8), group_size (32, 64 or "
            f"128) and parts (of {', '.join(QUANTIZED_PARTS)}); quantise the model again"
        )
    return dict(content)


def _with_tokens_of_tokenizer(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content of an InstructBLIP's config.json, with the tokens that begin and end a Vicuna's texts.

    Its authors gave the tokenizer another first token, "</s>", than the language model's configuration has (lines 86 to
    89 of ``blip2_vicuna_instruct.py``), and trained with that. Tokens not named in tokenizer_config.json stay.
    """
    path, text = folder / "tokenizer_config.json", content.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in KINDS or not path.exists():
        return content
    named, tokens = read_json(path), read_json(folder / "tokenizer.json").get("added_tokens") or []
    ids = {each.get("content"): each.get("id") for each in tokens if isinstance(each, dict)}
    changed: dict[str, Any] = {}
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            changed[f"{key}_id"] = ids[token]
    return content | {"text_config": text | changed}


def parse(content: dict[str, Any]) -> Blip2Config | MatcherConfig:
    """The configuration in the content of a config.json; ValueError for unsupported features."""
    seeing = _section(content, "vision_config")
    is_transformer = seeing.get("model_type") != CONVOLUTIONAL
    vision = parse_vision(seeing) if is_transformer else parse_convolutional(seeing)
    fields = _section(content, "qformer_config")
    if "qformer_text_input" in fields:  # the key's name before transformers 4.46
        fields.setdefault("use_qformer_text_input", fields["qformer_text_input"])
    if is_instruct := content.get("model_type") == INSTRUCT:
        fields["use_qformer_text_input"] = True
    qformer = QFormerConfig(
        num_query_tokens=_top(content, "num_query_tokens", "num_query_tokens", 32),
        encoder_hidden_size=vision.hidden_size,  # whatever the file has, as in the reference
        **_read(fields, "qformer_config", QFORMER),
    )
    image_token_id = content.get("image_token_index", content.get("image_token_id"))
    adapted = check_value("merged_adapters", content.get("merged_adapters") or "", "", "config.json")
    architectures = content.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"architectures is {reprlib.repr(architectures)}; it should be a list of names; {AGAIN}")
    if "Blip2ForImageTextRetrieval" in architectures:
        if image_token_id is not None:  # a published one is beyond the vocabulary, since it is never embedded
            check_token("image_token_index", image_token_id, MOST_TOKENS, "config.json")
        bos_token_id = content.get("qformer_bos_token_id", qformer.vocab_size - 1)
        check_token("qformer_bos_token_id", bos_token_id, qformer.vocab_size, "config.json")
        return MatcherConfig(
            vision=vision,
            qformer=qformer,
            projection_size=_top(content, "image_text_hidden_size", "projection_size", 256),
            bos_token_id=bos_token_id,
            has_lm_head=_top(content, "has_qformer_lm_head", "has_lm_head", False),
            image_token_id=image_token_id,
            adapted=adapted,
        )
    if qformer.has_text and not is_instruct:
        raise ValueError(
            "use_qformer_text_input is set in qformer_config of a generative model; if it is an InstructBLIP, whose "
            f"Q-Former reads the prompt, set model_type to {INSTRUCT!r}, else remove it"
        )
    language = _parse_language(_section(content, "text_config", with_null=True))
    if image_token_id is not None:
        check_token("image_token_index", image_token_id, language.vocab_size, "config.json")
    return Blip2Config(vision, qformer, language, image_token_id=image_token_id, adapted=adapted)


def parse_vision(section: dict[str, Any]) -> VisionConfig:
    """The vision transformer in the content of a vision_config; ValueError for unsupported features."""
    vision = VisionConfig(**_read(section, "vision_config", (*VISION, *VISION_EXTRA)))
    check_vision(vision)
    return vision


def _parse_language(text: dict[str, Any]) -> LanguageConfig:
    family = text.get("model_type", "opt")
    if family in KINDS:
        return parse_decoder(text)
    text = {key: value for key, value in text.items() if value is not None}
    if family == "opt":
        config = OPTConfig(**_read(text, "opt", OPT))
        if text.get("word_embed_proj_dim") not in (None, config.hidden_size):
            raise ValueError(
                f"word_embed_proj_dim is {reprlib.repr(text['word_embed_proj_dim'])}, but hidden_size "
                f"{config.hidden_size}; an OPT with projected embeddings is not supported"
            )
        return config
    if family in T5S:
        return _parse_t5(text, family)
    known = ", ".join(map(repr, LANGUAGES))
    raise ValueError(f"the language model is of family {reprlib.repr(family)}; supported are {known}")


def _parse_t5(text: dict[str, Any], family: Any) -> T5Config:
    if family != "t5":
        text = MT5 | text
    values = _read({"num_decoder_layers": text.get("num_layers", 6)} | text, "t5", T5) | _feed_forward(text)
    # Newer revisions mark every T5 as tied; the output layer in the files decides.
    scales_output = text.get("tie_word_embeddings", True)
    if family == "t5":
        scales_output = text.get("scale_decoder_outputs", scales_output)
    if family == "t5" and scales_output and values["has_gate"]:
        raise ValueError(
            "text_config has tied embeddings (tie_word_embeddings), whose scaled output only the first T5 has; for a "
            "Flan-T5, set tie_word_embeddings to false"
        )
    return T5Config(
        **values,
        scales_output=scales_output and family != "mt5",
        has_bias_in_each_layer=family == "umt5",
        model_type=family,
    )


def _feed_forward(text: dict[str, Any]) -> dict[str, Any]:
    *gate, activation = str(text.get("feed_forward_proj", "relu")).split("-")
    if gate == ["gated"] and activation == "gelu":
        activation = "gelu_new"
    return {"has_gate": bool(gate), "activation": text.get("dense_act_fn", activation)}


def _top(content: dict[str, Any], theirs: str, ours: str, default: Any) -> Any:
    """A value outside of all sections."""
    value = content.get(theirs)
    if theirs not in content and (near := [key for key in content if differs_in_a_bit(key, theirs)]):
        raise ValueError(f"there is {near[0]} but no {theirs} in config.json; {AGAIN}")
    return check_value(theirs, default if value is None else value, default, "config.json", BOUNDS.get(ours))


def _section(content: dict[str, Any], name: str, *, with_null: bool = False) -> dict[str, Any]:
    """A section of ``config.json``, without null keys if these mean the same as absent ones."""
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{name} is not a JSON object; fetch the file again")
    return {key: value for key, value in section.items() if with_null or value is not None}


def _read(section: dict[str, Any], kind: str, fields: Fields) -> dict[str, Any]:
    """Our fields of one section; ValueError for a value of the wrong type, or an unsupported one."""
    for theirs, known, default in FIXED[kind]:
        if section.get(theirs, default) not in known:
            raise ValueError(
                f"{theirs} is {reprlib.repr(section.get(theirs, default))} in {kind}; only "
                f"{' or '.join(repr(value) for value in known)} is supported"
            )
    values: dict[str, Any] = {}
    names = {name for name, _, _ in FIXED[kind]} | {theirs for _, theirs, _ in fields}
    check_names(section.keys(), names, kind)
    for ours, theirs, default in fields:
        value = section.get(theirs, default)
        if ours.endswith("_token_id"):  # bounded by the size of the vocabulary
            check_token(theirs, value, values["vocab_size"], kind)
        else:
            check_value(theirs, value, default, kind, BOUNDS.get(ours))
        values[ours] = value
    if kind == "t5" and values["max_distance"] <= values["num_buckets"] // 2:
        raise ValueError(
            f"relative_attention_max_distance is {values['max_distance']} in {kind}, but has to be more than half of "
            f"relative_attention_num_buckets, which is {values['num_buckets']}; {AGAIN}"
        )
    if "head_size" not in values and values["hidden_size"] % values["num_heads"]:
        raise ValueError(
            f"num_attention_heads is {values['num_heads']} in {kind}, which does not divide the hidden_size "
            f"{values['hidden_size']}; {AGAIN}"
        )
    return values


def _write(config: Any, fields: Fields) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs, _ in fields}


def config_json(config: Blip2Config | MatcherConfig, quantization: dict[str, Any] | None = None) -> dict[str, Any]:
    """``config.json`` as in the published repositories, with the quantisation, if any."""
    is_instruct = isinstance(config, Blip2Config) and config.reads_prompt
    qformer = {
        "model_type": "blip_2_qformer",
        "attention_probs_dropout_prob": config.qformer.dropout,
        "encoder_hidden_size": config.qformer.encoder_hidden_size,
        **_write(config.qformer, QFORMER),
    }
    if is_instruct:
        qformer["model_type"] = "instructblip_qformer"
        del qformer["use_qformer_text_input"]
    content: dict[str, Any] = {
        "model_type": INSTRUCT if is_instruct else BLIP2,
        "num_query_tokens": config.qformer.num_query_tokens,
        "image_token_index": config.image_token_id,
        "vision_config": vision_json(config.vision, is_instruct=is_instruct),
        "qformer_config": qformer,
    }
    if quantization is not None:
        content["quantization_config"] = {"quant_method": QUANTIZATION_METHOD, **quantization}
    if config.adapted:
        content["merged_adapters"] = config.adapted  # ours: indexes and encoded images identify the model by it, too
    if isinstance(config, MatcherConfig):
        return content | {
            "architectures": ["Blip2ForImageTextRetrieval"],
            "image_text_hidden_size": config.projection_size,
            "qformer_bos_token_id": config.bos_token_id,
            "has_qformer_lm_head": config.has_lm_head,
        }
    return content | {
        "architectures": [f"{'InstructBlip' if is_instruct else 'Blip2'}ForConditionalGeneration"],
        "use_decoder_only_language_model": not config.language.has_encoder,
        "text_config": text_json(config.language),
    }


def text_json(config: LanguageConfig) -> dict[str, Any]:
    """The language model's section of ``config.json``."""
    if isinstance(config, DecoderConfig):
        return dict(config.published)
    is_opt = isinstance(config, OPTConfig)
    text: dict[str, Any] = {"model_type": "opt", **_write(config, OPT)} if is_opt else _write(config, T5)
    if isinstance(config, OPTConfig):
        text |= {"word_embed_proj_dim": config.hidden_size, "do_layer_norm_before": True}
        text |= {"activation_function": "relu", "tie_word_embeddings": True}
    else:
        name = ("gated-" if config.has_gate else "") + config.activation.removesuffix("_new")
        text |= {"model_type": config.model_type, "dense_act_fn": config.activation, "feed_forward_proj": name}
        text |= {"is_gated_act": config.has_gate, "tie_word_embeddings": config.scales_output}
        text |= {"bos_token_id": config.eos_token_id}  # an empty prompt is a single </s>
    return text
