"""From a recipe to a finished model, both stages, on tiny models."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint, train
from blip2.errors import CheckpointError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer


def weights(folder):
    return checkpoint.load(folder).state_dict()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def is_frozen(name):
    return name.startswith(("vision.", "language.")) and not name.startswith("vision.post_norm.")


def assert_trained_and_frozen(before, after):
    for name, value in after.items():
        assert torch.equal(before[name], value) == is_frozen(name), name


def test_both_stages(write_recipe, matching_model, any_model, tmp_path):
    seen = []
    first = train.run(write_recipe(1, matching_model), report=seen.append)
    assert first == tmp_path / "out1"
    assert isinstance(checkpoint.load(first), Blip2Matcher)
    assert_trained_and_frozen(weights(matching_model), weights(first))
    assert [p.phase for p in seen][:1] == ["features"]
    assert (seen[-1].phase, seen[-1].message) == ("done", f"wrote {first}")
    evaluated = [line["evaluation"] for line in log(first) if "evaluation" in line]
    assert len(evaluated) == 2
    assert evaluated[0].keys() == {"itc", "itm", "lm", "image_to_text", "text_to_image", "matching"}

    seen.clear()
    second = train.run(write_recipe(2, any_model), report=seen.append, overrides={"qformer": str(first)})
    assert not [p for p in seen if p.phase == "features"], "the features of stage 1 serve again"
    model = checkpoint.load(second)
    assert isinstance(model, Blip2)
    assert_trained_and_frozen(weights(any_model), model.state_dict())
    evaluated = [line["evaluation"] for line in log(second) if "evaluation" in line]
    assert evaluated[0].keys() == {"lm", "caption", "dialogue", "question"}
    assert Tokenizer.from_folder(second).encode("two dogs")
    assert checkpoint.image_settings(second).size == 32
    # The Q-Former came from stage 1: after six small steps it still resembles that one, and not the other.
    found, taken = model.qformer.query_tokens, weights(first)["qformer.query_tokens"]
    other = weights(any_model)["qformer.query_tokens"]
    assert (found - taken).norm() < 0.5 * (found - other).norm()


@pytest.mark.parametrize("name", ["query_tokens", "vision_model.encoder.layers.0.mlp.fc1.weight"])
def test_a_damaged_start_is_told_before_the_work_begins(write_recipe, matching_model, tmp_path, name):
    start = shutil.copytree(matching_model, tmp_path / "start")
    tensors = load_file(start / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, start / "model.safetensors", {"format": "pt"})
    seen = []
    with pytest.raises(CheckpointError, match=rf"in files: {name}\) holds such values: the model is damaged"):
        train.run(write_recipe(1, start), report=seen.append)
    assert seen == [] and not (tmp_path / "out1").exists() and not (tmp_path / "features").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_resuming_gives_the_same_losses(write_recipe, matching_model, opt_model, tmp_path, stage):
    recipe = write_recipe(stage, matching_model if stage == 1 else opt_model)
    whole = train.run(recipe, overrides={"out": "whole"})

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.phase == "train" and progress.step == 5:
            raise Stop

    with pytest.raises(Stop):
        train.run(recipe, report=stop, overrides={"out": "parts"})
    parts = train.run(recipe, overrides={"out": "parts"})

    def losses(folder):
        return [{k: v for k, v in line.items() if k not in ("images_per_s", "cut_texts")} for line in log(folder)]

    assert losses(parts) == losses(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(parts)[name], value), name


def test_without_stored_features_the_losses_are_nearly_the_same(write_recipe, opt_model, tmp_path):
    recipe = write_recipe(2, opt_model)
    stored = train.run(recipe)
    path = tmp_path / "live.toml"
    path.write_text(recipe.read_text().replace('features = "features"', ""))
    live = train.run(path, overrides={"out": "live"})
    for with_file, without in zip(log(stored), log(live), strict=True):
        if "lm" in with_file:
            assert with_file["lm"] == pytest.approx(without["lm"], rel=1e-2)


def test_bf16_trains_too(write_recipe, matching_model, any_model):
    for stage, start in ((1, matching_model), (2, any_model)):
        out = train.run(write_recipe(stage, start), overrides={"precision": "bf16"})
        assert all(value.dtype == torch.float32 for value in weights(out).values())


def test_a_finished_run_is_not_repeated(write_recipe, opt_model):
    recipe = write_recipe(2, opt_model)
    out = train.run(recipe)
    before = (out / "model.safetensors").stat().st_mtime_ns
    seen = []
    assert train.run(recipe, report=seen.append) == out
    assert "finished already" in seen[-1].message
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_texts_that_were_cut_are_told(write_recipe, opt_model):
    seen = []
    out = train.run(write_recipe(2, opt_model), report=seen.append, overrides={"data.max_text_tokens": 3})
    assert log(out)[-2]["cut_texts"] > 0 or log(out)[-1]["cut_texts"] > 0
    assert sum("are cut" in progress.message for progress in seen) == 1


@pytest.mark.parametrize(
    ("stage", "overrides", "problem"),
    [
        (1, {"start": "OPT"}, "holds a generative model, stage 1 needs a matching one"),
        (2, {"start": "MATCHING"}, "holds a matching model, stage 2 needs a generative one"),
        (2, {"qformer": "OPT"}, "holds no matching model"),
        (2, {"optim.batch_size": 9}, "there are only 8 rows"),
        (2, {"data.max_prompt_tokens": 500}, "lower data.max_prompt_tokens"),
        (2, {"device": "abacus"}, "device: 'abacus' is none"),
    ],
)
def test_what_does_not_fit_is_said(write_recipe, matching_model, opt_model, stage, overrides, problem):
    names = {"OPT": str(opt_model), "MATCHING": str(matching_model)}
    overrides = {key: names.get(value, value) for key, value in overrides.items()}
    with pytest.raises(RecipeError) as raised:
        train.run(write_recipe(stage, matching_model if stage == 1 else opt_model), overrides=overrides)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_without_the_texts_of_the_stage_are_named(write_recipe, matching_model, opt_model, pictures, tmp_path):
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps({"image": p, "question": "who?", "answer": "me"}) + "\n" for p in pictures))
    with pytest.raises(RecipeError, match=r"picture000\.png: its row has no caption"):
        train.run(write_recipe(1, matching_model), overrides={"data.rows": rows})
    with pytest.raises(RecipeError, match=r"picture000\.png: its row has no text of a kind"):
        train.run(write_recipe(2, opt_model), overrides={"data.rows": rows, "data.mix.questions": 0})


def test_a_matching_model_without_caption_head_is_refused(write_recipe, matching_model, tmp_path):
    model = checkpoint.load(matching_model)
    published = Blip2Matcher(replace(model.config, has_lm_head=False))
    checkpoint.save(published, tmp_path / "published", tokenizer=matching_model / "tokenizer.json")
    with pytest.raises(RecipeError, match="no temperature and no caption head"):
        train.run(write_recipe(1, "published"))


def test_a_qformer_of_another_image_encoder_is_refused(write_recipe, matching_model, opt_model, tmp_path):
    other = checkpoint.load(matching_model)
    other.vision.blocks[0].fc1.bias.data += 1
    checkpoint.save(other, tmp_path / "other", tokenizer=matching_model / "tokenizer.json")
    with pytest.raises(RecipeError, match="another image encoder"):
        train.run(write_recipe(2, opt_model), overrides={"qformer": "other"})
