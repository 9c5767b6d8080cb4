"""The published layout, both ways: what is written is read again, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.checkpoint.keys import table
from blip2.config import CLIP_VIT_L, Blip2Config, MatcherConfig, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.errors import CheckpointError, OptionError
from blip2.model import Blip2, Blip2Matcher


@pytest.fixture
def folder(any_model: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model, to be spoilt."""
    return Path(shutil.copytree(any_model, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "config",
    [
        Blip2Config(language=OPTConfig()),
        Blip2Config(language=T5Config()),
        Blip2Config(vision=CLIP_VIT_L, qformer=QFormerConfig(encoder_hidden_size=1024), language=T5Config()),
        MatcherConfig(),
        MatcherConfig(has_lm_head=False),
    ],
)
def test_the_table_names_every_weight_once(config: Blip2Config | MatcherConfig) -> None:
    with torch.device("meta"):
        model = Blip2(config) if isinstance(config, Blip2Config) else Blip2Matcher(config)
    names = table(config)
    assert names.keys() == dict(model.named_parameters()).keys()
    assert len(set(names.values())) == len(names)


def test_published_sizes() -> None:
    """985,952,256 in the image encoder; 105,162,240 in the Q-Former without text and its queries (the reference's)."""
    with torch.device("meta"):
        model = Blip2(Blip2Config())
    assert sum(parameter.numel() for parameter in model.vision.parameters()) == 985_952_256
    assert sum(parameter.numel() for parameter in model.qformer.parameters()) == 105_162_240
    assert sum(parameter.numel() for parameter in model.projection.parameters()) == 1_968_640


def test_saved_and_loaded_is_the_same(any_model: Path, matching_model: Path, tmp_path: Path) -> None:
    for number, original in enumerate((any_model, matching_model)):
        first = checkpoint.load(original)
        checkpoint.save(first, tmp_path / str(number))
        second = checkpoint.load(tmp_path / str(number))
        assert second.config == first.config
        for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other), name
        assert not list((tmp_path / str(number)).glob("*.part"))
        assert len({file.stat().st_mode for file in (tmp_path / str(number)).iterdir()}) == 1


def test_half_precision_on_disk_is_full_precision_in_memory(any_model: Path, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(any_model), tmp_path, dtype=torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert {parameter.dtype for parameter in checkpoint.load(tmp_path).parameters()} == {torch.float32}


def test_several_files_with_an_index(any_model: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole, split = checkpoint.load(any_model), checkpoint.load(folder)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), split.parameters(), strict=True))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        checkpoint.load(folder)


NORM = "vision_model.post_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"{NORM} is missing"),
        (lambda tensors: tensors.update(surprise=torch.zeros(1)), "surprise is unexpected"),
        (
            lambda tensors: tensors.update({NORM: torch.zeros(7)}),
            rf"{NORM} has shape \[7\], but config.json requires \[16\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change: Callable, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 40), "damaged or incomplete"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: edit_config(folder, lambda c: c.update(model_type="bert")), "'bert', not 'blip-2'"),
        (lambda folder: edit_config(folder, lambda c: c["text_config"].update(model_type="rwkv")), "'rwkv'"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_one_line(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_one_line(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "has no weight_map of names to files; fetch the file again"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"'\.\./model\.safetensors' is not a .safetensors file"),
        ('{"weight_map": {"a": "/etc/model.safetensors"}}', "'/etc/model.safetensors' is not a .safetensors file"),
        ('{"weight_map": {"a": "..\\\\model.safetensors"}}', "is not a .safetensors file of this folder"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "'pytorch_model.bin' is not a .safetensors file of this folder"),
        ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "model-00001-of-00001.safetensors is missing"),
    ],
)
def test_an_index_that_leads_nowhere_or_elsewhere_is_one_line(folder: Path, index: str, message: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_of_several_files_cut_short_is_named(folder: Path) -> None:
    checkpoint.save(checkpoint.load(folder), folder, max_shard_size_bytes=60_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: is damaged or incomplete .*; fetch the file again"):
        checkpoint.load(folder)


def test_a_tensor_in_two_files_is_refused(opt_model: Path, tmp_path: Path) -> None:
    """One of them is a file of another model, and nobody knows which."""
    checkpoint.save(checkpoint.load(opt_model), tmp_path, max_shard_size_bytes=60_000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(second) | dict(islice(load_file(first).items(), 1)), second)
    with pytest.raises(CheckpointError, match=rf"{second.name}: .* is also in {first.name}"):
        checkpoint.load(tmp_path)


def test_a_folder_of_pickles_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled .bin weights are not read; convert them to safetensors"):
        checkpoint.load(folder)


def test_the_tied_table_may_be_there_under_its_other_name(opt_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt_model, tmp_path / "model"))
    embedded, head = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
    wanted = checkpoint.load(opt_model).language.token_embedding.weight
    rewrite(folder, lambda tensors: tensors.update({head: tensors[embedded].clone()}))
    assert torch.equal(checkpoint.load(folder).language.token_embedding.weight, wanted)
    rewrite(folder, lambda tensors: tensors.pop(embedded))
    assert torch.equal(checkpoint.load(folder).language.token_embedding.weight, wanted)


def test_older_names_are_read(matching_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(matching_model, tmp_path / "model"))
    edit_config(
        folder,
        lambda c: c["qformer_config"].update(qformer_text_input=c["qformer_config"].pop("use_qformer_text_input")),
    )
    rewrite(folder, lambda tensors: tensors.update({"embeddings.position_ids": torch.arange(8)[None]}))
    assert checkpoint.load(folder).config == checkpoint.load(matching_model).config


def test_the_layer_norm_eps_of_the_file_is_used(folder: Path) -> None:
    edit_config(folder, lambda c: c["vision_config"].update(layer_norm_eps=1e-5))
    assert checkpoint.load(folder).vision.post_norm.eps == 1e-5


def test_precision_follows_the_policy(any_model: Path) -> None:
    model = checkpoint.load(any_model, dtype=torch.bfloat16)
    assert model.language.token_embedding.weight.dtype == torch.bfloat16
    assert model.vision.class_embedding.dtype == torch.bfloat16
    assert model.qformer.query_tokens.dtype == model.projection.weight.dtype == torch.float32
    with pytest.raises(OptionError, match="float16 is not supported on a CPU"):
        checkpoint.load(any_model, dtype=torch.float16)


def test_small_vision_configuration_round_trips(tmp_path: Path) -> None:
    """CLIP L/14's make: no bias in the patch embedding, a norm before the blocks, QuickGELU."""
    vision = VisionConfig(8, 1, 2, 16, 28, 14, 1e-5, "quick_gelu", has_patch_bias=False, has_pre_norm=True)
    qformer = QFormerConfig(8, 1, 2, 16, encoder_hidden_size=8, num_query_tokens=2)
    model = Blip2(Blip2Config(vision, qformer, OPTConfig(16, 8, 1, 2, 16, 32, eos_token_id=2)))
    checkpoint.save(model, tmp_path)
    assert checkpoint.load(tmp_path).config == model.config
