"""Adapters that are trained: what learns, what is written, and that it is the same model merged and unmerged."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import blip2
from blip2 import checkpoint, train
from blip2.checkpoint.adapters import Adapters
from blip2.cli import cli
from blip2.errors import CheckpointError, RecipeError
from blip2.model import Blip2
from blip2.train import lora
from blip2.train.recipes import LoraRecipe
from tests import tiny

ALL = {"lora.parts": ["language", "qformer", "vision"], "data.features": None}


@pytest.fixture
def trained(write_recipe):
    """``trained(stage, start, {key: value})``: the folder of the adapter; None removes a key of the recipe."""

    def run(stage, start, overrides, report=None):
        path = write_recipe(stage, start)
        for key in [key for key, value in overrides.items() if value is None]:
            last = key.rpartition(".")[2]
            path.write_text("\n".join(x for x in path.read_text().splitlines() if not x.strip().startswith(last)))
        some = {"lora.rank": 3, "lora.alpha": 7.0, "optim.peak_lr": 0.02}
        kept = {key: value for key, value in overrides.items() if value is not None}
        return train.run(path, overrides=some | kept, report=report)

    return run


def seen_and_read(model, start: Path):
    """What a model makes of two images and the words after them: ``float[B, T, V]``, or logits of pairs."""
    pixels_BCHW = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        if not isinstance(model, Blip2):
            text_BT = torch.arange(6, 16).view(2, 5)
            return model.match(model.encode(pixels_BCHW), text_BT, torch.ones_like(text_BT))
        words_BTD = model.language.embed(torch.arange(6, 16).view(2, 5))
        prompt_BTD = torch.cat([model.prompt(model.encode(pixels_BCHW)).to(words_BTD), words_BTD], dim=1)
        logits_BV, state = model.language.prefill(prompt_BTD, torch.tensor([9, 9]), 2)
        return torch.stack([logits_BV, model.language.step(torch.tensor([7, 8]), state)])


def put(model, start: Path, adapter: Path, recipe: LoraRecipe):
    """A model with the adapter beside its layers, as it was trained, from the file."""
    model.freeze_pretrained()
    lora.put(model, recipe)
    saved = load_file(adapter / "adapter_model.safetensors")
    for change in model.lora.children():
        for name, first, second in zip(change.names, change.first, change.second, strict=True):
            for half, kind in ((first, "A"), (second, "B")):
                half.data.copy_(saved[f"base_model.model.{name}.lora_{kind}.weight"])
    return model.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_merged_it_is_the_model_that_was_trained(trained, any_model, matching_model, tmp_path, stage, rslora):
    start = matching_model if stage == 1 else any_model
    parts = ["qformer", "vision"] if stage == 1 else ALL["lora.parts"]
    out = trained(stage, start, ALL | {"lora.parts": parts, "lora.rslora": rslora, "lora.base": "fp32"})
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (out / "model.safetensors").exists()
    saved = load_file(out / "adapter_model.safetensors")
    moved = {name for name, each in saved.items() if "lora_B" in name and each.any()}
    for part in parts:
        assert any(name.startswith(f"base_model.model.{part}") for name in moved), f"nothing was learnt in {part}"
    recipe = LoraRecipe(parts=tuple(parts), rank=3, alpha=7.0, rslora=rslora)
    beside = seen_and_read(put(checkpoint.load(start), start, out, recipe), start)
    merged = seen_and_read(checkpoint.load(start, adapters=Adapters.of(out)), start)
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=1e-5)
    assert (merged - seen_and_read(checkpoint.load(start), start)).abs().max() > 0.01
    done = CliRunner().invoke(cli, ["merge", str(start), str(tmp_path / "merged"), "--adapter", str(out)])
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(seen_and_read(checkpoint.load(tmp_path / "merged"), start), merged, rtol=0, atol=1e-6)
    [adapter] = Adapters.of(out)
    assert (adapter.ranks, adapter.kind) == ([3], "rsLoRA" if rslora else "LoRA")


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "int4"])
def test_the_loss_falls_over_every_base(trained, any_model, base):
    losses = []
    out = trained(
        2, any_model, {"lora.base": base, "optim.steps": 30, "evaluation": None, "optim.min_lr": 1e-3},
        report=lambda progress: losses.append(progress.losses.get("lm")),
    )  # fmt: skip
    losses = [each for each in losses if each is not None]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    adapter = load_file(out / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    checkpoint.load(any_model, adapters=Adapters.of(out))


@pytest.mark.parametrize("trains_qformer", [False, True])
def test_gradients_reach_the_adapters_and_what_the_recipe_lets_learn(any_model, trains_qformer):
    model = checkpoint.load(any_model)
    model.freeze_pretrained()
    before = {name for name, each in model.named_parameters() if each.requires_grad}
    recipe = LoraRecipe(parts=("language", "vision"), trains_qformer=trains_qformer)
    lora.put(model, recipe)
    for change in model.lora.children():
        for second in change.second:
            torch.nn.init.normal_(second)
    pixels_BCHW = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    prompt_BQD = model.prompt(model.encode(pixels_BCHW))
    texts = torch.arange(6, 14).view(2, 4)
    if model.config.language.family == "t5":
        hidden = model.language(prompt_BQD, torch.tensor([4, 4]), texts)
    else:
        hidden = model.language(torch.cat([prompt_BQD, model.language.embed(texts)], dim=1))
    model.language.logits(hidden).square().sum().backward()
    reached = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    adapters = {name for name, _ in model.named_parameters() if name.startswith("lora.")}
    assert adapters and adapters <= reached
    assert reached - adapters == (before if trains_qformer else set())


@pytest.mark.parametrize("stage", [1, 2])
def test_what_learns_beside_the_adapters_is_saved_with_them(trained, any_model, matching_model, stage):
    start, parts = (matching_model, ["vision"]) if stage == 1 else (any_model, ["language"])
    removed = {"data.features": None} if stage == 1 else {}
    out = trained(stage, start, {"lora.parts": parts, "lora.trains_qformer": True, **removed})
    before, after = (checkpoint.load(start, adapters=each).state_dict() for each in (None, Adapters.of(out)))
    for name in before:
        is_adapted = "blocks" in name or "coder." in name
        is_whole = not name.startswith(("vision.", "language.")) or name.startswith("vision.post_norm")
        if is_whole:
            assert not torch.equal(before[name], after[name]), name
        elif not (is_adapted and name.startswith(f"{parts[0]}.")):
            assert torch.equal(before[name], after[name]), name


def test_over_an_instructblip(trained, tmp_path):
    """Whose Q-Former reads the prompt."""
    start = tiny.save_instructed("llama", tmp_path / "instructed")
    out = trained(2, start, {"lora.parts": ["language", "qformer"]})
    [adapter] = Adapters.of(out)
    assert any("intermediate.dense" in name for name in adapter.changes)
    before, after = (blip2.load(start, adapter=each) for each in (None, out))
    weights = [each.speaker.model.qformer.layers[0].text_feed_forward.output.weight for each in (before, after)]
    assert not torch.equal(*weights)


def test_some_targets_of_a_layer(trained, opt_model):
    out = trained(2, opt_model, {"lora.targets": ["q_proj", "language_model.model.decoder.layers.1.fc2", "query"],
                                 "lora.parts": ["language", "qformer"]})  # fmt: skip
    [adapter] = Adapters.of(out)
    names = {name.removesuffix(".weight") for name in adapter.changes}
    layers = "language_model.model.decoder.layers"
    assert {name for name in names if name.startswith("language")} == {
        f"{layers}.0.self_attn.q_proj", f"{layers}.1.self_attn.q_proj", f"{layers}.1.fc2"
    }  # fmt: skip
    assert any(name.endswith("crossattention.attention.query") for name in names)
    assert not any(name.endswith("key") for name in names)
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == names
    before, after = (checkpoint.load(opt_model, adapters=each) for each in (None, Adapters.of(out)))
    one, other = (model.language.blocks[0].qkv.weight.split(24) for model in (before, after))
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [False, True, True]


def test_resuming_gives_the_same_adapter(trained, opt_model, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.phase == "train" and progress.step == 3:
            raise Stop

    trained(2, opt_model, {"out": "whole"})
    with pytest.raises(Stop):
        trained(2, opt_model, {"out": "parts"}, report=stop)
    trained(2, opt_model, {"out": "parts"})
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(RecipeError, match=r"was saved with lora\.dropout = 0\.05, but the recipe has 0\.5"):
        trained(2, opt_model, {"out": "parts", "lora.dropout": 0.5, "optim.steps": 9})


@pytest.mark.parametrize(
    ("stage", "overrides", "problem"),
    [
        (2, {"lora.rank": 0}, "lora.rank: has to be at least 1, not 0"),
        (2, {"lora.alpha": 0}, "lora.alpha: has to be above 0"),
        (2, {"lora.dropout": 1}, "lora.dropout: has to be at least 0 and less than 1"),
        (2, {"lora.rslora": "yes"}, "lora.rslora: has to be true or false, not 'yes'"),
        (2, {"lora.parts": ["eyes"]}, "lora.parts: names 'eyes'; stage 2 has vision, qformer, language"),
        (2, {"lora.parts": []}, "lora.parts: names ''"),
        (1, {"lora.rank": 4}, "lora.parts: names 'language'; stage 1 has vision, qformer"),
        (1, {"lora.parts": "qformer", "lora.base": "int8"}, "lora.base: int8 applies to the language model"),
        (2, {"lora.parts": "vision"}, "data.features: needs a frozen image encoder, but this recipe trains it"),
        (2, {"lora.parts": "qformer", "lora.trains_qformer": True}, "would be trained both whole and by adapters"),
        (2, {"lora.rank": 4, "qformer": "somewhere"}, "qformer: cannot be combined with adapters, which belong to"),
        (2, {"lora.targets": "q_porj"}, "lora.targets: the language of this model has no q_porj; it has fc1, fc2"),
        (2, {"lora.target": "q_proj"}, "did you mean lora.targets?"),
    ],
)
def test_what_cannot_be_is_said(write_recipe, opt_model, matching_model, stage, overrides, problem):
    with pytest.raises(RecipeError) as raised:
        train.run(write_recipe(stage, opt_model if stage == 2 else matching_model), overrides=overrides)
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_a_quantised_start_is_refused(write_recipe, opt_model, tmp_path):
    small = checkpoint.load(opt_model, quantize="int8")
    checkpoint.save(small, tmp_path / "small", tokenizer=opt_model / "tokenizer.json")
    with pytest.raises(RecipeError, match="is quantised, but adapters are trained on the original"):
        train.run(write_recipe(2, tmp_path / "small"), overrides={"lora.rank": 4})


def test_an_adapter_that_cannot_be_written(opt_model, tmp_path):
    (tmp_path / "file").touch()
    model = checkpoint.load(opt_model)
    recipe = LoraRecipe()
    lora.put(model, recipe)
    with pytest.raises(CheckpointError, match="the adapter cannot be written"):
        lora.save(model, tmp_path / "file", recipe, "start")
