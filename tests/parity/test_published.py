"""The published models, in their revisions before and after November 2024: the same weights by the same names.

Sizes and names are compared on the meta device, contents with tiny models that the reference itself wrote.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.checkpoint.keys import ALIASES
from blip2.checkpoint.load import empty_model
from blip2.checkpoint.tensors import named_tensors
from blip2.config import Blip2Config, MatcherConfig, OPTConfig
from blip2.errors import CheckpointError
from blip2.published import PUBLISHED

# `text_config` as the repositories have it since November 2024, with what differs from the reference's defaults only
# (blip2-opt-2.7b's is published so; the others' are written after it and after their full ones).
TEXT = {
    "opt-2.7b": {
        "activation_dropout": 0.0, "eos_token_id": 50118, "ffn_dim": 10240, "hidden_size": 2560, "model_type": "opt",
        "num_attention_heads": 32, "num_hidden_layers": 32, "prefix": "</s>", "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "opt-6.7b": {
        "eos_token_id": 50118, "ffn_dim": 16384, "hidden_size": 4096, "model_type": "opt", "num_attention_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 50304, "word_embed_proj_dim": 4096,
    },
    "flan-t5-xl": {
        "bos_token_id": 1, "d_ff": 5120, "d_model": 2048, "decoder_start_token_id": 0, "dense_act_fn": "gelu",
        "feed_forward_proj": "gated-gelu", "is_gated_act": True, "model_type": "t5", "num_decoder_layers": 24,
        "num_heads": 32, "num_layers": 24, "output_past": True, "tie_word_embeddings": False,
    },
    "flan-t5-xxl": {
        "bos_token_id": 1, "d_ff": 10240, "d_model": 4096, "decoder_start_token_id": 0, "dense_act_fn": "gelu",
        "feed_forward_proj": "gated-gelu", "is_gated_act": True, "model_type": "t5", "num_decoder_layers": 24,
        "num_heads": 64, "num_layers": 24, "output_past": True, "tie_word_embeddings": False,
    },
    # Of the InstructBLIPs, as the reference's script of conversion makes them; they were not seen.
    "vicuna-7b": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 2048, "bos_token_id": 2,
        "eos_token_id": 2, "pad_token_id": 32000, "tie_word_embeddings": False,
    },
    "vicuna-13b": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 5120, "num_hidden_layers": 40,
        "num_attention_heads": 40, "intermediate_size": 13824, "max_position_embeddings": 2048, "bos_token_id": 2,
        "eos_token_id": 2, "pad_token_id": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
# What the older revisions, which write every field, have beside it.
FULL_VISION = {
    "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408, "image_size": 224, "intermediate_size": 6144,
    "layer_norm_eps": 1e-05, "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 39, "patch_size": 14,
    "prefix": None, "projection_dim": 512, "qkv_bias": True, "tie_word_embeddings": True, "torch_dtype": None,
}  # fmt: skip
FULL_QFORMER = {
    "bos_token_id": None, "classifier_dropout": None, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "blip_2_qformer", "num_attention_heads": 12,
    "num_hidden_layers": 12, "position_embedding_type": "absolute", "tie_word_embeddings": True, "vocab_size": 30522,
}  # fmt: skip


def published_json(name: str, *, is_old: bool) -> dict:
    """``config.json`` of a published repository before or after November 2024."""
    size = {"image_size": 364} if name.endswith("-coco") else {}
    content: dict = {"model_type": "blip-2", "num_query_tokens": 32, "torch_dtype": "float32"}
    content["vision_config"] = FULL_VISION | size if is_old else {"dropout": 0.0, "num_channels": 3} | size
    content["qformer_config"] = FULL_QFORMER if is_old else {"classifier_dropout": None}
    if "itm" in name:
        text_key = "qformer_text_input" if is_old else "use_qformer_text_input"
        content["qformer_config"] = content["qformer_config"] | {"vocab_size": 30523, text_key: True}
        content |= {"architectures": ["Blip2ForImageTextRetrieval"], "image_text_hidden_size": 256}
        return content | ({"image_token_index": 30523} if is_old else {})  # out of range, in one revision
    text = TEXT[re.sub(r"^Salesforce/(blip2|instructblip)-|-coco$", "", name)]
    if "instructblip" in name:
        content |= {"model_type": "instructblip", "architectures": ["InstructBlipForConditionalGeneration"]}
        content |= {"qformer_config": content["qformer_config"] | {"vocab_size": 30523}, "text_config": text}
        return content | {"image_token_index": 32100 if text["model_type"] == "t5" else 32001}
    content |= {"architectures": ["Blip2ForConditionalGeneration"], "text_config": text}
    if not is_old:
        return content | {"image_token_index": 50265 if text["model_type"] == "opt" else 32100}
    if text["model_type"] == "opt":
        content["text_config"] = text | {"vocab_size": 50272}
    return content


REVISIONS = [(name, is_old) for name in PUBLISHED for is_old in (True, False) if not (is_old and "instruct" in name)]
IDS = [f"{name.removeprefix('Salesforce/')}, {'before' if is_old else 'after'}" for name, is_old in REVISIONS]


def read(content: dict, folder: Path) -> Blip2Config | MatcherConfig:
    (folder / "config.json").write_text(json.dumps(content))
    return checkpoint.read_config(folder)


@pytest.mark.parametrize(("name", "is_old"), REVISIONS, ids=IDS)
def test_the_configuration_is_read(name: str, is_old: bool, tmp_path: Path) -> None:
    wanted = PUBLISHED[name].config
    if is_old:
        wanted = replace(wanted, vision=replace(wanted.vision, layer_norm_eps=1e-5), image_token_id=None)
        if isinstance(wanted, MatcherConfig):
            wanted = replace(wanted, image_token_id=30523)
        elif isinstance(wanted.language, OPTConfig):
            wanted = replace(wanted, language=replace(wanted.language, vocab_size=50272))
    assert read(published_json(name, is_old=is_old), tmp_path) == wanted


@pytest.mark.parametrize(("name", "is_old"), REVISIONS, ids=IDS)
def test_names_and_shapes_are_the_reference_s(name: str, is_old: bool, tmp_path: Path) -> None:
    content = published_json(name, is_old=is_old)
    ours = {key: tensor.shape for key, tensor in named_tensors(empty_model(read(content, tmp_path)))}
    if "qformer_text_input" in content["qformer_config"]:  # which the reference has forgotten
        content["qformer_config"]["use_qformer_text_input"] = content["qformer_config"].pop("qformer_text_input")
    kind = transformers.InstructBlipConfig if "instruct" in name else transformers.Blip2Config
    config = kind.from_dict(content)
    with torch.device("meta"):
        theirs = getattr(transformers, content["architectures"][0])(config)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    second_names = {other for aliases in ALIASES.values() for other in aliases} - ours.keys()
    assert ours == {key: shape for key, shape in shapes.items() if key not in second_names}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_size_in_the_table_is_the_model_s(name: str) -> None:
    published = PUBLISHED[name]
    size_bytes = 4 * sum(parameter.numel() for parameter in empty_model(published.config).parameters())
    assert published.size_gb == round(size_bytes / 1e9, 1)
    if name == "Salesforce/blip2-opt-2.7b":  # its two files together, with their headers
        assert 0 < 9_996_328_120 + 4_982_879_016 - size_bytes < 200_000


def test_a_pin_is_a_whole_commit() -> None:
    for published in PUBLISHED.values():
        assert published.revision is None or (len(published.revision) == 40 and int(published.revision, 16))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_reference_s_shards_are_read_bit_for_bit(pair, tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = copy.deepcopy(pair.theirs).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    state = theirs.state_dict()
    for name, tensor in named_tensors(checkpoint.load(tmp_path)):
        assert torch.equal(tensor, state[name].float()), name


def test_our_shards_are_read_by_the_reference_bit_for_bit(pair, tmp_path: Path) -> None:
    checkpoint.save(pair.ours, tmp_path, max_shard_size_bytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    state = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in named_tensors(pair.ours):
        assert torch.equal(tensor, state[name]), name


def test_our_matching_shards_are_read_by_the_reference_bit_for_bit(matching_pair, tmp_path: Path) -> None:
    checkpoint.save(matching_pair.ours, tmp_path, max_shard_size_bytes=30_000)
    state = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path).state_dict()
    for name, tensor in named_tensors(matching_pair.ours):
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("pair", ["opt, 3 queries"], indirect=True)
@pytest.mark.parametrize("present", ["table", "head", "both"])
def test_opt_s_tied_table_under_either_name(pair, tmp_path: Path, present: str) -> None:
    """The older files hold it twice or under the head's name, and have fewer rows and no image token."""
    table, head = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
    pair.theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors.pop(table, None) if table in tensors else tensors.pop(head)
    tensors |= {name: weight.clone() for name in {"table": [table], "head": [head], "both": [table, head]}[present]}
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["image_token_index"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = checkpoint.load(tmp_path)
    assert loaded.config.image_token_id is None
    assert same(loaded, pair.ours)


@pytest.mark.parametrize("pair", ["opt, 3 queries"], indirect=True)
def test_an_opt_whose_head_is_another_table_is_refused(pair, tmp_path: Path) -> None:
    table, head = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
    pair.theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {head: tensors[table] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*embed_tokens\.weight"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("pair", ["t5, 3 queries, heads narrower than the model"], indirect=True)
def test_a_t5_head_that_was_tied_on_saving_is_the_table(pair, tmp_path: Path) -> None:
    """The reference ties a Flan-T5's head if it was never given weights of its own, and then does not write it."""
    theirs = copy.deepcopy(pair.theirs)
    theirs.language_model.lm_head.weight = theirs.language_model.shared.weight
    theirs.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"] |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    language = checkpoint.load(tmp_path).language
    assert torch.equal(language.output.weight, language.token_embedding.weight)


@pytest.mark.parametrize("pair", ["t5, 3 queries, heads narrower than the model"], indirect=True)
def test_a_t5_head_that_is_lost_is_missed(pair, tmp_path: Path) -> None:
    """A published Flan-T5 has a head of its own; a file without it is not whole."""
    checkpoint.save(pair.ours, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"language_model\.lm_head\.weight is missing"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("matching_pair", [None], indirect=True, ids=["no image token"])
def test_an_older_matching_model(matching_pair, tmp_path: Path) -> None:
    """The text branch under its older key, the image token out of range: the same weights and the same text vector."""
    matching_pair.theirs.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["qformer_config"]["qformer_text_input"] = content["qformer_config"].pop("use_qformer_text_input")
    content["image_token_index"] = content["qformer_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == replace(matching_pair.ours.config, image_token_id=content["image_token_index"])
    assert same(loaded, matching_pair.ours)


@pytest.mark.parametrize("matching_pair", [None], indirect=True, ids=["no image token"])
@pytest.mark.parametrize("change", [0, 1])
def test_a_matching_model_with_its_text_tables_twice(matching_pair, change: int, tmp_path: Path) -> None:
    """Equal copies under the Q-Former's names are passed over; others are another model's."""
    matching_pair.theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tables = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
    save_file(tensors | {f"qformer.{name}": tensors[name] + change for name in tables}, tmp_path / "model.safetensors")
    if change:
        with pytest.raises(CheckpointError, match=r"qformer\.embeddings\.word_embeddings\.weight differs"):
            checkpoint.load(tmp_path)
    else:
        assert same(checkpoint.load(tmp_path), matching_pair.ours)
