"""``config.json`` and its neighbours: read as the reference reads them, refused where this package would be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2 import checkpoint
from blip2.checkpoint.settings import config_json, read_quantization
from blip2.config import CLIP_MEAN, Blip2Config, MatcherConfig, OPTConfig, T5Config
from blip2.errors import CheckpointError

FLAN = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
OURS = {"quant_method": "blip2", "bits": 8, "group_size": 64, "parts": ["language"]}


def read(folder: Path, **content: object) -> Blip2Config | MatcherConfig:
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2"} | content))
    return checkpoint.read_config(folder)


@pytest.mark.parametrize(
    ("section", "content"),
    [
        ("text_config", {}),
        ("text_config", {"model_type": "opt", "hidden_size": 2560, "num_attention_heads": 32, "eos_token_id": 50118}),
        ("text_config", FLAN),
        ("text_config", FLAN | {"dense_act_fn": "gelu", "num_layers": 24, "d_ff": 5120}),
        ("text_config", FLAN | {"num_layers": 3, "num_decoder_layers": 2, "eos_token_id": None}),
        ("vision_config", {}),
        ("vision_config", {"hidden_size": 64, "image_size": 364}),
        ("qformer_config", {"num_hidden_layers": 3, "encoder_hidden_size": 99}),
    ],
)
def test_an_absent_field_means_what_the_reference_takes_it_for(tmp_path: Path, section: str, content: dict) -> None:
    transformers = pytest.importorskip("transformers")
    ours = read(tmp_path, **{section: content})
    theirs = transformers.Blip2Config.from_dict({"model_type": "blip-2", section: dict(content)})
    written = config_json(ours)
    for part in ("vision_config", "qformer_config", "text_config"):
        their_part = getattr(theirs, part).to_dict()
        for field, value in written[part].items():
            if field in their_part and field not in ("tie_word_embeddings", "bos_token_id", "eos_token_id"):
                assert value == their_part[field], (part, field)
    if content.get("eos_token_id", 0) is not None:
        assert ours.language.eos_token_id == theirs.text_config.eos_token_id


def test_written_and_read_is_the_same(tmp_path: Path) -> None:
    for config in (Blip2Config(image_token_id=50265), Blip2Config(language=T5Config()), MatcherConfig()):
        assert read(tmp_path, **config_json(config)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text_config": {"model_type": "rwkv"}}, "family 'rwkv'; supported are 'opt', 't5', .*'llama'"),
        ({"text_config": {"word_embed_proj_dim": 512, "hidden_size": 1536}}, "proj_dim is 512, but hidden_size"),
        ({"text_config": {"do_layer_norm_before": False}}, "is False in opt; only True is supported"),
        ({"text_config": {"activation_function": "gelu"}}, "activation_function is 'gelu' in opt"),
        ({"text_config": {"model_type": "t5", "feed_forward_proj": "prelu"}}, "feed_forward_proj is 'prelu' in t5"),
        ({"text_config": FLAN | {"dense_act_fn": "tanh"}}, "dense_act_fn is 'tanh' in t5; .* 'gelu' or 'gelu_new'"),
        ({"text_config": FLAN | {"tie_word_embeddings": True}}, "for a Flan-T5, set tie_word_embeddings to false"),
        ({"text_config": FLAN | {"d_model": "large"}}, "d_model is 'large' in t5; it should be something like 512"),
        ({"text_config": FLAN | {"d_ff": [1]}}, r"d_ff is \[1\] in t5"),
        ({"text_config": "opt"}, "text_config is not a JSON object"),
        ({"vision_config": {"qkv_bias": False}}, "qkv_bias is False in vision_config"),
        ({"vision_config": {"hidden_act": "silu"}}, "hidden_act is 'silu' in vision_config"),
        ({"qformer_config": {"position_embedding_type": "relative_key"}}, "position_embedding_type is 'relative_key'"),
    ],
)  # fmt: skip
def test_what_would_be_built_wrongly_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **content)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        ("text_config", {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5 in opt; .* a whole number from 1 to 512"),
        ("text_config", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000 in opt"),
        ("text_config", {"hidden_size": -192}, "hidden_size is -192 in opt"),
        ("text_config", {"num_attention_heads": 7}, "is 7 in opt, which does not divide the hidden_size"),
        ("text_config", {"num_attention_heads": True}, "num_attention_heads is True in opt"),
        ("text_config", {"eos_token_id": 10**9}, "eos_token_id is 1000000000 in opt; .* from 0 to 50271"),
        ("text_config", {"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\] in opt"),
        ("text_config", FLAN | {"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan in t5"),
        ("text_config", FLAN | {"d_kv": 0}, "d_kv is 0 in t5"),
        ("vision_config", {"patch_size": 0}, "patch_size is 0 in vision_config"),
        ("vision_config", {"patch_size": 225}, "patch_size is 225 in vision_config, more than the image_size"),
        ("vision_config", {"hidden_size": "1408"}, "hidden_size is '1408' in vision_config"),
        ("vision_config", {"layer_norm_eps": -1e-6}, "layer_norm_eps is -1e-06 in vision_config"),
        ("vision_config", {"patch_bias": "no"}, "patch_bias is 'no' in vision_config; .* true or false"),
        ("qformer_config", {"cross_attention_frequency": 0}, "cross_attention_frequency is 0 in qformer_config"),
        ("qformer_config", {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5 in qformer_config"),
        ("text_config", FLAN | {"relative_attention_max_distance": 16}, "relative_attention_max_distance is 16 in t5"),
        ("text_config", {"num_attentinn_heads": 32}, "there is num_attentinn_heads but no num_attention_heads in opt"),
        (None, {"num_query_tokens": "x"}, "num_query_tokens is 'x' in config.json"),
        (None, {"architectures": 5}, "architectures is 5"),
        (None, {"image_token_index": 50272}, "image_token_index is 50272 in config.json"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused(tmp_path: Path, section: str | None, content: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **({section: content} if section else content))
    assert str(caught.value).endswith("fetch the file again") and "\n" not in str(caught.value)


def test_a_file_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_small_files_as_any_editor_saves_them(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "config.json").write_bytes(json.dumps(config_json(Blip2Config())).encode(encoding))
    (tmp_path / "preprocessor_config.json").write_bytes(b'{"size": 224}'.decode().encode(encoding))
    assert checkpoint.image_settings(tmp_path, checkpoint.read_config(tmp_path)).size == 224


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": 364}, "size is 364, but the model takes images of 224 pixels .* set size to 224"),
        ({"size": {"height": 10**6, "width": 10**6}}, "size is 1000000; .* a whole number from 1 to 4096"),
        ({"size": {"height": 224, "width": 336}}, "size is .*'width': 336.* a square"),
        ({"size": {}}, "size is {}"),
        ({"size": "224"}, "size is '224'"),
        ({"size": True}, "size is True"),
        ({"image_mean": 5}, "image_mean is 5; it should be three numbers"),
        ({"image_mean": [123.7, 116.3, 103.5]}, "image_mean is 123.7"),
        ({"image_std": [0, 0, 0]}, "image_std is 0"),
        ({"image_std": [0.5, 0.5, math.nan]}, "image_std is nan"),
        ({"do_normalize": False}, "do_normalize is False, but only True is supported"),
        ({"do_center_crop": True}, "do_center_crop is True, but only False is supported"),
        ({"resample": 0}, "resample is 0, but only 3 or 2 or 1 is supported"),
        ({"rescale_factor": 1}, "rescale_factor is 1, "),
        ({"do_resize": [[]]}, r"do_resize is \[\[\]\]"),
    ],
)  # fmt: skip
def test_settings_that_would_show_other_pictures_are_refused(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {message}") as caught:
        checkpoint.image_settings(tmp_path, Blip2Config())
    assert "\n" not in str(caught.value)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(PLAIN, st.lists, max_leaves=3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([{}, FLAN]), st.sampled_from(["vision_config", "qformer_config", "text_config"]), st.data())
def test_no_configuration_is_a_traceback(tmp_path_factory, text: dict, section: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    written = config_json(Blip2Config(language=T5Config() if text else OPTConfig()))
    field = data.draw(st.sampled_from([None, *written[section]]))
    written[section] = data.draw(JSON) if field is None else written[section] | {field: data.draw(JSON)}
    try:
        read(folder, **written)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by 'bitsandbytes', which is not supported"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
        ({"load_in_8bit": True}, "quantised by 'another program'"),
        ("int8", "quantised by 'int8'"),
        (OURS | {"bits": 3}, r"it needs bits \(4 or 8\).*quantise the model again"),
        (OURS | {"group_size": 0}, r"group_size \(32, 64 or 128\)"),
        (OURS | {"group_size": True}, r"group_size \(32, 64 or 128\)"),
        (OURS | {"parts": []}, "parts"),
        (OURS | {"parts": ["qformer"]}, "parts"),
    ],
)
def test_quantisation_that_is_not_ours_is_refused(tmp_path: Path, quantization: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, quantization_config=quantization)
    assert "\n" not in str(caught.value)


def test_our_quantisation_is_written_and_read(tmp_path: Path) -> None:
    config = Blip2Config()
    quantization = {"bits": 4, "group_size": 32, "parts": ["language"]}
    assert read(tmp_path, **config_json(config, quantization)) == config
    assert read_quantization(tmp_path) == {"quant_method": "blip2"} | quantization
    read(tmp_path, **config_json(config))
    assert read_quantization(tmp_path) is None


def test_image_settings_where_newer_processors_keep_them(tmp_path: Path) -> None:
    inside = {"size": {"height": 364, "width": 364}, "image_mean": list(CLIP_MEAN)}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inside, "num_query_tokens": 32}))
    assert checkpoint.image_settings(tmp_path).size == 364
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    assert checkpoint.image_settings(tmp_path).size == 224


def test_no_image_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"there is no preprocessor_config\.json"):
        checkpoint.image_settings(tmp_path)
