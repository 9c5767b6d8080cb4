"""LAVIS files lack what was frozen: where it comes from, what is made to fit, and what does not and is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2 import checkpoint
from blip2.checkpoint import lavis
from blip2.checkpoint.lavis import convert_from_lavis, convert_to_lavis
from blip2.config import CLIP_VIT_L, Blip2Config, QFormerConfig, T5Config
from blip2.errors import CheckpointError
from tests import tiny
from tests.checkpoint import lavis_models
from tests.checkpoint.lavis_models import assert_same, lavis_file, random, save_model, state_of, weights, written


@pytest.fixture(params=lavis_models.KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tiny model of each kind."""
    return save_model(request.param, tmp_path / "model")


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Path:
    """What LAVIS would have saved of the model."""
    convert_to_lavis(folder, tmp_path / "trained.pth")
    return tmp_path / "trained.pth"


def image_encoder_of(folder: Path) -> dict[str, Tensor]:
    """The image encoder of a model as the authors publish it: by itself, without a prefix."""
    state = written(folder, folder.with_name("whole.pth"), trainable_only=False)
    prefix = "visual_encoder."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def without(folder: Path, prefix: str) -> Path:
    """The model, and what was frozen of it under that prefix taken away."""
    kept = {name: value for name, value in weights(folder).items() if not name.startswith(prefix) or "post_" in name}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_the_image_encoder_comes_from_its_own_file(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Of which BLIP-2 does not use the last block, nor the head."""
    wanted, own = weights(folder), image_encoder_of(folder)
    count = checkpoint.load(folder).config.vision.num_layers
    unused = {
        name.replace("blocks.0.", f"blocks.{count}."): value for name, value in own.items() if "blocks.0." in name
    }
    torch.save(own | unused | {"head.weight": random(3, 3), "norm.bias": random(3)}, tmp_path / "vit.pth")
    convert_from_lavis(trained, tmp_path / "back", like=without(folder, "vision_model."), vision=tmp_path / "vit.pth")
    assert_same(weights(tmp_path / "back"), wanted)


def test_the_image_encoder_that_was_trained_comes_before_all_others(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    original = image_encoder_of(folder)
    torch.save(original, tmp_path / "vit.pth")
    tuned = {f"visual_encoder.{name}": value + 1 for name, value in original.items()}
    path = lavis_file(tmp_path / "tuned.pth", state_of(trained) | tuned)
    convert_from_lavis(path, tmp_path / "back", like=folder, vision=tmp_path / "vit.pth")
    convert_to_lavis(tmp_path / "back", tmp_path / "again.pth", trainable_only=False)
    again = state_of(tmp_path / "again.pth")
    assert_same({name: again[name] for name in tuned}, tuned)


def test_an_image_encoder_trained_in_part_is_not_filled_up(folder: Path, trained: Path, tmp_path: Path) -> None:
    name, value = next(iter(image_encoder_of(folder).items()))
    path = lavis_file(tmp_path / "half.pth", state_of(trained) | {f"visual_encoder.{name}": value})
    with pytest.raises(CheckpointError, match=r"half\.pth: vision_model\..* is missing; the file is incomplete"):
        convert_from_lavis(path, tmp_path / "back", like=folder)


def test_position_embeddings_fit_the_size_of_the_pictures(folder: Path, trained: Path, tmp_path: Path) -> None:
    """As the authors' loading has it: bicubic, CLIP's with aligned corners, the class token untouched."""
    own = image_encoder_of(folder)
    is_clip = "positional_embedding" in own
    name = "positional_embedding" if is_clip else "pos_embed"
    shape = (10, 16) if is_clip else (1, 10, 16)
    own[name] = random(*shape)
    torch.save(own, tmp_path / "vit.pth")
    convert_from_lavis(trained, tmp_path / "back", like=folder, vision=tmp_path / "vit.pth")
    grid = own[name].reshape(10, 16)[1:].T.reshape(1, 16, 3, 3)
    wanted = torch.nn.functional.interpolate(grid, (2, 2), mode="bicubic", align_corners=is_clip)
    found = weights(tmp_path / "back")["vision_model.embeddings.position_embedding"][0]
    assert torch.equal(found[0], own[name].reshape(10, 16)[0])
    torch.testing.assert_close(found[1:], wanted.reshape(16, 4).T)


def test_an_image_encoder_trained_on_larger_pictures_keeps_their_size(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    own = image_encoder_of(folder)
    name = "positional_embedding" if "positional_embedding" in own else "pos_embed"
    own[name] = random(*own[name].shape[:-2], 10, 16)
    tuned = {f"visual_encoder.{name}": value for name, value in own.items()}
    path = lavis_file(tmp_path / "tuned.pth", state_of(trained) | tuned)
    convert_from_lavis(path, tmp_path / "back", like=folder)
    assert checkpoint.load(tmp_path / "back").config.vision.image_size == 48
    assert checkpoint.image_settings(tmp_path / "back").size == 48


@pytest.fixture(params=["opt", "opt, older", "t5"])
def generative(request, tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """A model, what LAVIS saves of it, and the state of its language model in that one's own repository."""
    family = request.param.partition(",")[0]
    folder = tiny.save_generative(family, tmp_path / "model")
    convert_to_lavis(folder, tmp_path / "trained.pth")
    prefix = "language_model."
    own = {name.removeprefix(prefix): value for name, value in weights(folder).items() if name.startswith(prefix)}
    if "older" in request.param:
        own = {name.removeprefix("model."): value for name, value in own.items()}
    return folder, tmp_path / "trained.pth", own


def test_the_language_model_comes_from_its_own_repository(generative, tmp_path: Path) -> None:
    folder, trained, own = generative
    wanted = weights(folder)
    (tmp_path / "language").mkdir()
    save_file(own, tmp_path / "language" / "model.safetensors")
    like = without(folder, "language_model.")
    convert_from_lavis(trained, tmp_path / "back", like=like, language=tmp_path / "language")
    assert_same(weights(tmp_path / "back"), wanted)


def test_the_language_model_comes_from_another_model_in_several_files(generative, tmp_path: Path) -> None:
    folder, trained, _ = generative
    wanted = weights(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "model.safetensors").unlink()
    names = list(wanted)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in files.items():
        save_file({name: wanted[name] for name in chosen}, other / file)
    index = {"weight_map": {name: file for file, chosen in files.items() for name in chosen}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_from_lavis(trained, tmp_path / "back", like=without(folder, "language_model."), language=other)
    assert_same(weights(tmp_path / "back"), wanted)
    convert_from_lavis(trained, tmp_path / "again", like=other)
    assert_same(weights(tmp_path / "again"), wanted)
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()


def test_a_vocabulary_of_another_size_is_the_language_models(opt_model: Path, tmp_path: Path) -> None:
    """The published table of OPT has 50304 rows, the original one 50272."""
    convert_to_lavis(opt_model, tmp_path / "a.pth")
    folder = Path(shutil.copytree(opt_model, tmp_path / "model"))
    words = "language_model.model.decoder.embed_tokens.weight"
    save_file({name: value[:346] if name == words else value for name, value in weights(folder).items()},
              folder / "model.safetensors")  # fmt: skip
    convert_from_lavis(tmp_path / "a.pth", tmp_path / "back", like=opt_model, language=folder)
    model = checkpoint.load(tmp_path / "back")
    assert model.config == replace(model.config, language=replace(tiny.language_config("opt"), vocab_size=346))


def test_the_table_of_words_is_found_under_its_second_name(tmp_path: Path) -> None:
    opt_model = save_model("opt", tmp_path / "opt")
    convert_to_lavis(opt_model, tmp_path / "a.pth")
    folder, wanted = Path(shutil.copytree(opt_model, tmp_path / "model")), weights(opt_model)
    words, head = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
    save_file({head if name == words else name: value for name, value in wanted.items()}, folder / "model.safetensors")
    convert_from_lavis(tmp_path / "a.pth", tmp_path / "back", like=folder)
    assert_same(weights(tmp_path / "back"), wanted)
    assert_same(written(folder, tmp_path / "b.pth", trainable_only=False),
                written(opt_model, tmp_path / "c.pth", trainable_only=False))  # fmt: skip


def test_precision_is_kept(tmp_path: Path) -> None:
    """LAVIS keeps the image encoder's matrices in half precision and all else of it in full."""
    opt_model = save_model("opt", tmp_path / "opt")
    checkpoint.save(checkpoint.load(opt_model), tmp_path / "half", dtype=torch.float16)
    state = written(tmp_path / "half", tmp_path / "a.pth", trainable_only=False)
    assert {value.dtype for value in state.values()} == {torch.float16}
    state["visual_encoder.blocks.0.attn.q_bias"] = state["visual_encoder.blocks.0.attn.q_bias"].float()
    state["visual_encoder.blocks.0.attn.v_bias"] = state["visual_encoder.blocks.0.attn.v_bias"].float()
    convert_from_lavis(lavis_file(tmp_path / "b.pth", state), tmp_path / "back", like=opt_model)
    bias = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    assert {name for name, value in weights(tmp_path / "back").items() if value.dtype != torch.float16} == {bias}


def test_published_sizes_are_known_by_their_weights() -> None:
    """A CLIP file goes with a published model of the same language model, whose image encoder is EVA-CLIP."""
    with torch.device("meta"):
        tensors = dict.fromkeys(["vision_model.post_layernorm.weight"], torch.empty(1024))
    trained = lavis._in_memory(tensors, Path("a.pth"))
    fitted = lavis._fitted(Blip2Config(language=T5Config()), "t5", trained, trained)
    qformer = QFormerConfig(encoder_hidden_size=1024)
    assert fitted == Blip2Config(vision=CLIP_VIT_L, qformer=qformer, language=T5Config())


@pytest.mark.parametrize(
    ("projection", "width", "name"),
    [
        ("t5_proj, instructed", 2048, "Salesforce/instructblip-flan-t5-xl"),
        ("llm_proj, instructed", 4096, "Salesforce/instructblip-vicuna-7b"),
        ("llm_proj, instructed", 5120, "Salesforce/instructblip-vicuna-13b"),
        ("llm_proj", 5120, None),
        ("opt_proj", 2560, "Salesforce/blip2-opt-2.7b"),
        ("opt_proj", 4096, "Salesforce/blip2-opt-6.7b"),
        ("t5_proj", 2048, "Salesforce/blip2-flan-t5-xl"),
        ("t5_proj", 4096, "Salesforce/blip2-flan-t5-xxl"),
        ("vision_proj", 256, "Salesforce/blip2-itm-vit-g"),
        ("opt_proj", 24, None),
    ],
)
def test_the_published_twin_is_found_by_size(
    projection: str, width: int, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(name: str) -> Path:
        asked.append(name)
        raise CheckpointError("it is not here")

    monkeypatch.setattr(lavis, "resolve", resolve)
    projection, _, is_instructed = projection.partition(", ")
    state = {f"{projection}.weight": random(width, 1), f"{projection}.bias": random(width)}
    if is_instructed:
        state["Qformer.bert.embeddings.word_embeddings.weight"] = random(2, 1)
    message = "does not have the size of a published model; name a model with its configuration"
    message = "it is not here" if name else message
    with pytest.raises(CheckpointError, match=message):
        convert_from_lavis(lavis_file(tmp_path / "a.pth", state), tmp_path / "back")
    assert asked == ([name] if name else [])


def assert_refused(message: str, tmp_path: Path, convert: Callable, *arguments: object, **options: object) -> None:
    """One line, and nothing written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("prefix", "option"), [("vision_model.", "--vision"), ("language_model.", "--language")])
def test_a_part_that_nobody_has_is_named_with_its_option(generative, prefix: str, option: str, tmp_path: Path) -> None:
    folder, trained, _ = generative
    like = without(folder, prefix)
    message = f"trained.pth: a part is missing; name .*{option}"
    assert_refused(message, tmp_path, convert_from_lavis, trained, tmp_path / "back", like=like)
    (like / "model.safetensors").unlink()
    assert_refused("--vision", tmp_path, convert_from_lavis, trained, tmp_path / "back", like=like)


def test_what_does_not_fit_is_named(folder: Path, trained: Path, tmp_path: Path) -> None:
    state = state_of(trained)
    norm = "Qformer.bert.embeddings.LayerNorm.weight"
    for change, message in (
        ({norm: random(7)}, r"spoilt\.pth: qformer\.(embeddings\.)?layernorm\.weight has shape \[7\], not \[16\]"),
        ({norm.replace("embeddings", "encoder.layer.9.output_query"): random(16)}, r"layer\.9\..* does not occur in"),
        ({"ln_vision.weight": random(1408)}, "not"),
    ):
        path = lavis_file(tmp_path / "spoilt.pth", state | change)
        assert_refused(message, tmp_path, convert_from_lavis, path, tmp_path / "back", like=folder)
    path = lavis_file(tmp_path / "spoilt.pth", {name: value for name, value in state.items() if name != norm})
    assert_refused(
        r"spoilt\.pth: qformer\.(embeddings\.)?layernorm\.weight is missing",
        tmp_path,
        convert_from_lavis,
        path,
        tmp_path / "back",
        like=folder,
    )


def test_models_of_different_kinds_are_kept_apart(opt_model: Path, matching_model: Path, tmp_path: Path) -> None:
    """OPT-6.7b and Flan-T5-XXL have the same width: their projections would fit each other."""
    t5_model = tiny.save_generative("t5", tmp_path / "t5")
    for source, like, message in (
        (opt_model, t5_model, "is a model with OPT, but .* is a model with T5"),
        (t5_model, matching_model, "is a model with T5, but .* is a matching model"),
        (matching_model, opt_model, r"is a matching model \(stage 1\), but .* is a model with OPT"),
    ):
        convert_to_lavis(source, tmp_path / "a.pth")
        assert_refused(message, tmp_path, convert_from_lavis, tmp_path / "a.pth", tmp_path / "back", like=like)
        (tmp_path / "a.pth").unlink()


def test_what_exists_is_not_written_over(folder: Path, trained: Path, tmp_path: Path) -> None:
    assert_refused("exists already", tmp_path, convert_to_lavis, folder, trained)
    assert_refused("already has a model", tmp_path, convert_from_lavis, trained, folder, like=folder)


def test_a_bias_for_the_keys_has_no_place_in_lavis(opt_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt_model, tmp_path / "model"))
    tensors, name = weights(folder), "vision_model.encoder.layers.0.self_attn.qkv.bias"
    tensors[name][20] = 1
    save_file(tensors, folder / "model.safetensors")
    assert_refused(
        f"{name} has a bias for the keys", tmp_path, convert_to_lavis, folder, tmp_path / "a.pth", trainable_only=False
    )
    convert_to_lavis(folder, tmp_path / "a.pth")  # the image encoder is not in it


def test_a_folder_that_does_not_fit_its_configuration_is_named(opt_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt_model, tmp_path / "model"))
    for change, message in (({"surprise": random(1)}, "surprise is unexpected"), ({"query_tokens": random(1)}, "not")):
        save_file(weights(opt_model) | change, folder / "model.safetensors")
        assert_refused(message, tmp_path, convert_to_lavis, folder, tmp_path / "a.pth")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert_refused("damaged", tmp_path, convert_to_lavis, folder, tmp_path / "a.pth")


def test_nothing_is_left_of_what_was_interrupted(opt_model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_lavis(opt_model, tmp_path / "a.pth", progress=stop)
    assert not list(tmp_path.iterdir())
    convert_to_lavis(opt_model, tmp_path / "a.pth")
    with pytest.raises(KeyboardInterrupt):
        convert_from_lavis(tmp_path / "a.pth", tmp_path / "back", like=opt_model, progress=stop)
    assert not list((tmp_path / "back").iterdir())


def test_a_disk_that_is_full_is_one_line(opt_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert_refused("No space left on device.*; free space", tmp_path, convert_to_lavis, opt_model, tmp_path / "a.pth")
