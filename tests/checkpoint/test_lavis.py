"""The authors' files: every value lands where it belongs and comes back, and what is no such file is named."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from blip2 import checkpoint
from blip2.checkpoint.lavis import convert_from_lavis, convert_to_lavis, read_lavis
from blip2.config import MatcherConfig, QFormerConfig, VisionConfig
from blip2.errors import CheckpointError
from blip2.model import Blip2Matcher
from blip2.train import stage1
from tests import tiny
from tests.checkpoint import lavis_models
from tests.checkpoint.lavis_models import assert_same, lavis_file, random, save_model, weights, written

GOLDEN = Path(__file__).parents[1] / "golden" / "lavis_stage1.safetensors"


@pytest.fixture(params=lavis_models.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tiny model of each kind."""
    return save_model(request.param, tmp_path / "model")


def test_there_and_back_is_the_same_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    convert_to_lavis(folder, tmp_path / "all.pth", trainable_only=False)
    convert_from_lavis(tmp_path / "all.pth", tmp_path / "back", like=folder)
    assert_same(weights(tmp_path / "back"), weights(folder))
    assert checkpoint.load(tmp_path / "back").config == checkpoint.load(folder).config


def test_what_was_frozen_comes_from_the_model_it_is_like(folder: Path, tmp_path: Path) -> None:
    state = written(folder, tmp_path / "trained.pth")
    convert_from_lavis(tmp_path / "trained.pth", tmp_path / "back", like=folder)
    assert_same(weights(tmp_path / "back"), weights(folder))
    assert not [name for name in state if name.startswith(("visual_encoder.", "opt_model.", "t5_model.", "llm_model."))]
    assert_same(written(tmp_path / "back", tmp_path / "again.pth"), state)


def test_all_that_stands_beside_the_weights_is_kept(folder: Path, tmp_path: Path) -> None:
    convert_to_lavis(folder, tmp_path / "trained.pth")
    convert_from_lavis(tmp_path / "trained.pth", tmp_path / "back", like=folder)
    for file in folder.rglob("*.json"):
        assert (tmp_path / "back" / file.relative_to(folder)).read_bytes() == file.read_bytes()
    names, its = ({path.relative_to(where) for path in where.rglob("*")} for where in (tmp_path / "back", folder))
    assert names == its
    assert len({file.stat().st_mode for file in (tmp_path / "back").rglob("*") if file.is_file()}) == 1


def test_progress_counts_every_weight(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_to_lavis(folder, tmp_path / "a.pth", trainable_only=False, progress=lambda *count: seen.append(count))
    total = len(weights(folder))
    assert seen == [(done, total) for done in range(1, total + 1)]
    seen.clear()
    convert_from_lavis(tmp_path / "a.pth", tmp_path / "b", like=folder, progress=lambda *count: seen.append(count))
    assert seen == [(done, total) for done in range(1, total + 1)]


# The names below are written by hand, from the authors' modules, and not by the tables that are tested.

EVA_NAMES = {
    "visual_encoder.cls_token": ("vision_model.embeddings.class_embedding", (1, 1, 8)),
    "visual_encoder.pos_embed": ("vision_model.embeddings.position_embedding", (1, 5, 8)),
    "visual_encoder.patch_embed.proj.weight": ("vision_model.embeddings.patch_embedding.weight", (8, 3, 14, 14)),
    "visual_encoder.patch_embed.proj.bias": ("vision_model.embeddings.patch_embedding.bias", (8,)),
    "visual_encoder.blocks.12.norm1.weight": ("vision_model.encoder.layers.12.layer_norm1.weight", (8,)),
    "visual_encoder.blocks.12.attn.qkv.weight": ("vision_model.encoder.layers.12.self_attn.qkv.weight", (24, 8)),
    "visual_encoder.blocks.12.attn.proj.bias": ("vision_model.encoder.layers.12.self_attn.projection.bias", (8,)),
    "visual_encoder.blocks.12.norm2.bias": ("vision_model.encoder.layers.12.layer_norm2.bias", (8,)),
    "visual_encoder.blocks.0.mlp.fc1.weight": ("vision_model.encoder.layers.0.mlp.fc1.weight", (16, 8)),
    "visual_encoder.blocks.0.mlp.fc2.weight": ("vision_model.encoder.layers.0.mlp.fc2.weight", (8, 16)),
}
CLIP_BLOCK = "visual_encoder.transformer.resblocks.7."
CLIP_NAMES = {
    "visual_encoder.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", (8, 3, 14, 14)),
    "visual_encoder.ln_pre.weight": ("vision_model.pre_layernorm.weight", (8,)),
    f"{CLIP_BLOCK}ln_1.bias": ("vision_model.encoder.layers.7.layer_norm1.bias", (8,)),
    f"{CLIP_BLOCK}attn.in_proj_weight": ("vision_model.encoder.layers.7.self_attn.qkv.weight", (24, 8)),
    f"{CLIP_BLOCK}attn.in_proj_bias": ("vision_model.encoder.layers.7.self_attn.qkv.bias", (24,)),
    f"{CLIP_BLOCK}attn.out_proj.weight": ("vision_model.encoder.layers.7.self_attn.projection.weight", (8, 8)),
    f"{CLIP_BLOCK}ln_2.weight": ("vision_model.encoder.layers.7.layer_norm2.weight", (8,)),
    f"{CLIP_BLOCK}mlp.c_fc.weight": ("vision_model.encoder.layers.7.mlp.fc1.weight", (16, 8)),
    f"{CLIP_BLOCK}mlp.c_proj.bias": ("vision_model.encoder.layers.7.mlp.fc2.bias", (8,)),
}
LAYER, PUBLISHED_LAYER = "Qformer.bert.encoder.layer.10.", "qformer.encoder.layer.10."
QFORMER_NAMES = {
    "query_tokens": ("query_tokens", (1, 4, 8)),
    "ln_vision.weight": ("vision_model.post_layernorm.weight", (8,)),
    "Qformer.bert.embeddings.LayerNorm.bias": ("qformer.layernorm.bias", (8,)),
    f"{LAYER}attention.self.query.weight": (f"{PUBLISHED_LAYER}attention.attention.query.weight", (8, 8)),
    f"{LAYER}attention.output.dense.weight": (f"{PUBLISHED_LAYER}attention.output.dense.weight", (8, 8)),
    f"{LAYER}attention.output.LayerNorm.weight": (f"{PUBLISHED_LAYER}attention.output.LayerNorm.weight", (8,)),
    f"{LAYER}crossattention.self.key.weight": (f"{PUBLISHED_LAYER}crossattention.attention.key.weight", (8, 8)),
    f"{LAYER}crossattention.output.LayerNorm.bias": (f"{PUBLISHED_LAYER}crossattention.output.LayerNorm.bias", (8,)),
    f"{LAYER}intermediate_query.dense.weight": (f"{PUBLISHED_LAYER}intermediate_query.dense.weight", (16, 8)),
    f"{LAYER}output_query.LayerNorm.weight": (f"{PUBLISHED_LAYER}output_query.LayerNorm.weight", (8,)),
    f"{LAYER}intermediate.dense.bias": (f"{PUBLISHED_LAYER}intermediate.dense.bias", (16,)),
    f"{LAYER}output.dense.weight": (f"{PUBLISHED_LAYER}output.dense.weight", (8, 16)),
}
STAGE_1_NAMES = {
    "Qformer.bert.embeddings.word_embeddings.weight": ("embeddings.word_embeddings.weight", (20, 8)),
    "Qformer.bert.embeddings.position_embeddings.weight": ("embeddings.position_embeddings.weight", (6, 8)),
    "vision_proj.weight": ("vision_projection.weight", (4, 8)),
    "text_proj.bias": ("text_projection.bias", (4,)),
    "itm_head.weight": ("itm_head.weight", (2, 8)),
    "temp": ("temp", ()),
    "Qformer.cls.predictions.bias": ("qformer_lm_head.bias", (20,)),
    "Qformer.cls.predictions.transform.dense.weight": ("qformer_lm_head.transform.dense.weight", (8, 8)),
    "Qformer.cls.predictions.transform.LayerNorm.bias": ("qformer_lm_head.transform.LayerNorm.bias", (8,)),
}
OPT_NAMES = {
    "opt_proj.weight": ("language_projection.weight", (24, 8)),
    "opt_model.model.decoder.layers.3.self_attn.q_proj.bias": (
        "language_model.model.decoder.layers.3.self_attn.q_proj.bias", (24,),
    ),
}  # fmt: skip
T5_NAMES = {
    "t5_proj.bias": ("language_projection.bias", (24,)),
    "t5_model.decoder.block.2.layer.1.EncDecAttention.q.weight": (
        "language_model.decoder.block.2.layer.1.EncDecAttention.q.weight", (24, 24),
    ),
    "t5_model.lm_head.weight": ("language_model.lm_head.weight", (20, 24)),
}  # fmt: skip
INSTRUCT_NAMES = {
    "llm_proj.weight": ("language_projection.weight", (24, 8)),
    "Qformer.bert.embeddings.word_embeddings.weight": ("qformer.embeddings.word_embeddings.weight", (20, 8)),
    "Qformer.bert.embeddings.position_embeddings.weight": ("qformer.embeddings.position_embeddings.weight", (6, 8)),
    "Qformer.bert.embeddings.LayerNorm.bias": ("qformer.embeddings.layernorm.bias", (8,)),
    f"{LAYER}intermediate.dense.bias": (f"{PUBLISHED_LAYER}intermediate.dense.bias", (16,)),
    "llm_model.model.layers.3.self_attn.q_proj.weight": (
        "language_model.model.layers.3.self_attn.q_proj.weight", (24, 24),
    ),
    "llm_model.lm_head.weight": ("language_model.lm_head.weight", (20, 24)),
}  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [EVA_NAMES, CLIP_NAMES, QFORMER_NAMES, STAGE_1_NAMES, OPT_NAMES, T5_NAMES, INSTRUCT_NAMES],
    ids=["EVA-CLIP", "CLIP", "Q-Former", "stage 1", "OPT", "T5", "InstructBLIP"],
)
def test_every_name_has_its_published_one(names: dict[str, tuple[str, tuple[int, ...]]], tmp_path: Path) -> None:
    state = {name: random(*shape) for name, (_, shape) in names.items()}
    found = read_lavis(lavis_file(tmp_path / "a.pth", state))
    assert_same(found, {published: state[name] for name, (published, _) in names.items()})


def test_query_and_value_biases_become_one_with_nothing_between(tmp_path: Path) -> None:
    state = {"visual_encoder.blocks.38.attn.q_bias": random(4), "visual_encoder.blocks.38.attn.v_bias": random(4)}
    found = read_lavis(lavis_file(tmp_path / "a.pth", state))
    query, value = state.values()
    assert_same(found, {"vision_model.encoder.layers.38.self_attn.qkv.bias": torch.cat([query, torch.zeros(4), value])})
    del state["visual_encoder.blocks.38.attn.v_bias"]
    with pytest.raises(CheckpointError, match=r"layers\.38\.self_attn\.v_bias is missing"):
        read_lavis(lavis_file(tmp_path / "a.pth", state))


def test_the_embeddings_of_clip_get_their_leading_dimensions(tmp_path: Path) -> None:
    state = {"visual_encoder.class_embedding": random(8), "visual_encoder.positional_embedding": random(5, 8)}
    found = read_lavis(lavis_file(tmp_path / "a.pth", state))
    assert torch.equal(
        found["vision_model.embeddings.class_embedding"], state["visual_encoder.class_embedding"][None, None]
    )
    assert torch.equal(
        found["vision_model.embeddings.position_embedding"], state["visual_encoder.positional_embedding"][None]
    )


def test_what_only_repeats_is_dropped(tmp_path: Path) -> None:
    """The buffer and the tied tables that LAVIS's saving leaves in its files."""
    state = {
        "query_tokens": random(1, 4, 8),
        "Qformer.bert.embeddings.position_ids": torch.arange(6)[None],
        "opt_model.lm_head.weight": random(20, 8),
        "t5_model.encoder.embed_tokens.weight": random(20, 8),
    }
    assert read_lavis(lavis_file(tmp_path / "a.pth", state)).keys() == {"query_tokens"}


def test_the_caption_head_is_tied_or_refused(tmp_path: Path) -> None:
    words, bias = random(20, 8), random(20)
    state = {
        "Qformer.bert.embeddings.word_embeddings.weight": words,
        "Qformer.cls.predictions.bias": bias,
        "Qformer.cls.predictions.decoder.weight": words,
        "Qformer.cls.predictions.decoder.bias": bias,
    }
    found = read_lavis(lavis_file(tmp_path / "a.pth", state))
    assert_same(found, {"embeddings.word_embeddings.weight": words, "qformer_lm_head.bias": bias})
    for name in ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"):
        with pytest.raises(CheckpointError, match="differs from"):
            read_lavis(lavis_file(tmp_path / "a.pth", state | {name: state[name] + 1}))


def test_files_of_the_format_before_zip_are_read(tmp_path: Path) -> None:
    state = {"query_tokens": random(1, 4, 8)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same(read_lavis(tmp_path / "a.pth"), state)


class Harm:
    """Runs as code in a careless reader."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo harm",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "damaged or incomplete"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "is no PyTorch file"),
        (lambda path: path.write_bytes(pickle.dumps({"model": Harm()}, 2)), "would run as code, and was not opened"),
        (lambda path: lavis_file(path, {"query_tokens": random(1)}, extra=Harm()), "would run as code"),
        (lambda path: torch.save([random(2)], path), "has a list, not weights by name"),
        (lambda path: torch.save({"query_tokens": random(1)}, path), "has no weights under 'model'"),
        (lambda path: lavis_file(path, {"query_tokens": 3}), "has no weights under 'model'"),
        (lambda path: lavis_file(path, {"gpt_proj.weight": random(2, 2)}), "gpt_proj.weight is not a weight of BLIP-2"),
    ],
)  # fmt: skip
def test_what_is_no_lavis_file_is_one_line(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lavis(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_file_cut_short_is_one_line(is_zip: bool, part: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"query_tokens": random(64, 64)}}, path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match="fetch") as caught:
        read_lavis(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def recording() -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
    """A model of stage 1 that the authors' own code made: its state, its sizes, and what it answered."""
    with safe_open(GOLDEN, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sizes = json.loads(file.metadata()["config"])
    state = {name.removeprefix("weights."): value for name, value in values.items() if name.startswith("weights.")}
    return state, sizes, values


def test_a_state_of_the_authors_own_code_answers_as_it_did_there(recording, tmp_path: Path) -> None:
    state, sizes, values = recording
    qformer = QFormerConfig(
        sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"], sizes["intermediate_size"],
        sizes["vision_width"], sizes["cross_attention_frequency"], sizes["layer_norm_eps"], 0.0,
        sizes["num_query_tokens"], sizes["vocab_size"], sizes["max_position_embeddings"], has_text=True,
    )  # fmt: skip
    # The recording has no image encoder but the norm behind it, whose epsilon is the authors'.
    vision = VisionConfig(sizes["vision_width"], 1, 1, 8, 28, 14, 1e-5)
    like = Blip2Matcher(MatcherConfig(vision, qformer, sizes["embed_dim"], sizes["bos_token_id"], has_lm_head=False))
    checkpoint.save(like, tmp_path / "like", tokenizer=tiny.matching_tokenizer().to_str())
    convert_from_lavis(lavis_file(tmp_path / "a.pth", state), tmp_path / "model", like=tmp_path / "like")
    model = checkpoint.load(tmp_path / "model")
    assert isinstance(model, Blip2Matcher) and model.config.has_lm_head

    negatives = (values["itm_negative_image"], values["itm_negative_text"])
    found = stage1.losses(
        model, values["image_embeds"], values["input_ids"], values["attention_mask"], negatives=negatives
    )
    for name in ("itc", "itm", "lm"):
        assert getattr(found, name).item() == pytest.approx(values[f"loss_{name}"].item(), abs=1e-5), name
    torch.testing.assert_close(found.similarity_BB, values["itc_similarity"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.matching_N2[:4], values["itm_logits"], rtol=0, atol=1e-5)

    assert_same(written(tmp_path / "model", tmp_path / "again.pth"), state)


def test_a_language_model_for_which_the_authors_have_no_names(tmp_path):
    folder = tiny.save_generative("llama", tmp_path / "llama")
    with pytest.raises(CheckpointError, match="its language model is a qwen3; the authors' format supports"):
        convert_to_lavis(folder, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
