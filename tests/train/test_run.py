"""From a recipe to a finished model, both stages, on tiny models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import blip2
from blip2 import checkpoint, train
from blip2.checkpoint.assemble import assemble, qformer_start
from blip2.disk import locked
from blip2.errors import CheckpointError, ImageError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.text import Tokenizer
from blip2.vision import VisionTransformer
from tests import tiny

IN_BF16 = {"precision": "bf16", "optim.steps": 2}
"""Slow where the processor has no instructions for it."""


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
    with pytest.raises(CheckpointError, match=rf"in files: {name}\) has such values: the model is damaged"):
        train.run(write_recipe(1, start), report=seen.append)
    assert seen == [] and not (tmp_path / "out1").exists() and not (tmp_path / "features").exists()


def test_what_is_trained_shares_the_frozen_files_of_its_start(write_recipe, matching_model, opt_model, tmp_path):
    starts = assemble(
        tmp_path / "start", vision=checkpoint.open_encoder(opt_model), language=str(opt_model),
        qformer=replace(qformer_start(str(matching_model)), tensors={}),
    )  # fmt: skip
    outs = [
        train.run(write_recipe(stage, start), overrides={"precision": "bf16", "optim.steps": 1})
        for stage, start in enumerate(starts, start=1)
    ]
    for start, out in zip(starts, outs, strict=True):
        frozen = [path.name for path in start.glob("*_model.safetensors")]
        assert sorted(path.name for path in out.glob("*.safetensors*")) == sorted(
            [*frozen, "qformer.safetensors", "model.safetensors.index.json"]
        )
        assert all((out / name).samefile(start / name) for name in frozen)
        assert_trained_and_frozen(weights(start), weights(out))
        checkpoint.load(out)


def test_one_run_at_a_time(write_recipe, matching_model, tmp_path):
    with locked(tmp_path / "out1" / "training" / "lock"), pytest.raises(RecipeError, match="out1: another run is"):
        train.run(write_recipe(1, matching_model))
    assert not (tmp_path / "features").exists()


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
        measured = ("images_per_s", "cut_texts", "tokens_per_s", "mfu", "mfu_of", "peak_memory_mb")
        return [{k: v for k, v in line.items() if k not in measured} for line in log(folder)]

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


def test_stage_1_in_bf16(write_recipe, matching_model):
    out = train.run(write_recipe(1, matching_model), overrides=IN_BF16)
    assert all(value.dtype == torch.float32 for value in weights(out).values())


def test_stage_2_in_bf16(write_recipe, any_model):
    out = train.run(write_recipe(2, any_model), overrides=IN_BF16)
    assert all(value.dtype == torch.float32 for value in weights(out).values())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_instructblip_goes_on_learning(write_recipe, tmp_path, family):
    """Its Q-Former reads what is asked, and what is written is an InstructBLIP again, with both tokenizers."""
    start = tiny.save_instructed(family, tmp_path / "instructed")
    out = train.run(write_recipe(2, start))
    before, after = weights(start), weights(out)
    table = "qformer.word_embedding.weight"
    assert checkpoint.read_config(out) == checkpoint.read_config(start) and not torch.equal(before[table], after[table])
    for name in ("tokenizer.json", "qformer_tokenizer/tokenizer.json"):
        assert (out / name).read_text() == (start / name).read_text()
    assert isinstance(blip2.load(out).ask(tiny.picture(1), "what colour is the car?"), str)


# ---- images that cannot be read ----


@pytest.fixture
def broken(rows, tmp_path):
    """Two of the eight images: one cut, one missing."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    content = Path(lines[2]["image"]).read_bytes()
    cut, missing = tmp_path / "cut.png", tmp_path / "missing.png"
    cut.write_bytes(content[: len(content) // 2])
    lines[2]["image"], lines[7]["image"] = str(cut), str(missing)
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {str(cut), str(missing)}


def losses(folder):
    kinds = ("itc", "itm", "lm", "evaluation")
    return [{kind: line[kind] for kind in kinds if kind in line} for line in log(folder) if "bad_picture" not in line]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("features", ["features", None])
def test_bad_pictures_are_passed_over_counted_and_named(
    write_recipe, matching_model, opt_model, broken, tmp_path, stage, features
):
    path, seen = write_recipe(stage, matching_model if stage == 1 else opt_model), []
    if features is None:
        path.write_text(path.read_text().replace('features = "features"', ""))
    out = train.run(path, report=seen.append)
    named = [line for line in log(out) if "bad_picture" in line]
    assert {line["bad_picture"] for line in named} == broken and len(named) == 2
    assert all("damaged or truncated" in line["problem"] or "no such file" in line["problem"] for line in named)
    assert [line for line in log(out) if "bad_pictures" in line][-1]["bad_pictures"] == 2
    assert seen[-1].message.endswith("; unreadable images: 2, skipped and listed in log.jsonl")
    assert sum(progress.message.startswith("skipped: ") for progress in seen) == 2

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.phase == "train" and progress.step == 3 and progress.losses:
            raise Stop

    with pytest.raises(Stop):
        train.run(path, report=stop, overrides={"out": "parts"})
    assert losses(train.run(path, overrides={"out": "parts"})) == losses(out)


def test_bad_pictures_end_a_training_that_is_told_so(write_recipe, opt_model, broken, tmp_path):
    path, seen = write_recipe(2, opt_model), []
    path.write_text(path.read_text().replace('features = "features"', ""))
    with pytest.raises(RecipeError, match=r'1 of 8 images do not exist, .*missing\.png; .*on_bad_picture = "skip"$'):
        train.run(path, overrides={"data.on_bad_picture": "stop"})
    (tmp_path / "missing.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r'data\.on_bad_picture = "skip"$') as raised:
        train.run(path, report=seen.append, overrides={"data.on_bad_picture": "stop"})
    assert any(name in str(raised.value) for name in broken) and "allow_truncated" not in str(raised.value)
    saved = [progress.step for progress in seen if progress.message.startswith("saved the state")]
    assert saved == [progress.step for progress in seen if progress.losses][-1:]
    # The same recipe goes on from there once it passes them over, and learns what it would have learnt.
    assert losses(train.run(path)) == losses(train.run(path, overrides={"out": "whole"}))


def test_a_training_without_a_picture_is_an_error(write_recipe, opt_model, rows, tmp_path):
    rows.write_text("".join(json.dumps({"image": f"{n}.png", "caption": "a dog"}) + "\n" for n in range(8)))
    with pytest.raises(RecipeError, match=r"8 of 8 images do not exist, the first is .*0\.png"):
        train.run(write_recipe(2, opt_model))
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"none of the images of 8 rows can be read; one error: .*\d\.png"):
        train.run(write_recipe(2, opt_model))


def test_a_finished_run_is_not_repeated(write_recipe, opt_model):
    recipe = write_recipe(2, opt_model)
    out = train.run(recipe)
    before = (out / "model.safetensors").stat().st_mtime_ns
    seen = []
    assert train.run(recipe, report=seen.append) == out
    assert "already finished" in seen[-1].message
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_texts_that_were_cut_are_told(write_recipe, opt_model):
    seen = []
    out = train.run(write_recipe(2, opt_model), report=seen.append, overrides={"data.max_text_tokens": 3})
    assert log(out)[-2]["cut_texts"] > 0 or log(out)[-1]["cut_texts"] > 0
    assert sum("are cut" in progress.message for progress in seen) == 1


@pytest.mark.parametrize(
    ("stage", "overrides", "problem"),
    [
        (1, {"start": "OPT"}, "is a generative model, but stage 1 needs a matching model"),
        (2, {"start": "MATCHING"}, "is a matching model, but stage 2 needs a generative model"),
        (2, {"qformer": "OPT"}, "is not a matching model"),
        (2, {"optim.batch_size": 9}, "there are only 8 rows"),
        (2, {"data.max_prompt_tokens": 500}, "lower data.max_prompt_tokens"),
        (2, {"device": "abacus"}, "device: 'abacus' is not available"),
    ],
)
def test_what_does_not_fit_is_said(write_recipe, matching_model, opt_model, stage, overrides, problem):
    names = {"OPT": str(opt_model), "MATCHING": str(matching_model)}
    overrides = {key: names.get(value, value) for key, value in overrides.items()}
    with pytest.raises(RecipeError) as raised:
        train.run(write_recipe(stage, matching_model if stage == 1 else opt_model), overrides=overrides)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def no_features(monkeypatch):
    """Whoever computes a feature has asked too late."""

    def too_late(*_, **__):
        raise AssertionError("a feature was computed before this was told")

    monkeypatch.setattr(VisionTransformer, "features", too_late)


def changed(folder, tmp_path, **tensors):
    """A copy of a model with other tensors."""
    model = checkpoint.load(folder)
    for name, value in tensors.items():
        model.get_parameter(name.replace("__", ".")).data.copy_(value)
    checkpoint.save(model, tmp_path / "changed", tokenizer=folder / "tokenizer.json")
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("stage", "overrides", "problem"),
    [
        (2, {"start": "models/stage1"}, "start: there is no folder {tmp}/models/stage1; name the folder of a model"),
        (2, {"start": "./stage1"}, "start: there is no folder {tmp}/stage1; name"),
        (2, {"start": "/no/where"}, "start: there is no folder /no/where; name"),
        (2, {"start": "kept/stage_1"}, "did you mean {tmp}/kept/stage1?"),
        (2, {"qformer": "runs/stage1"}, "qformer: there is no folder {tmp}/runs/stage1"),
        (2, {"data.images": "elsewhere", "data.rows": "relative.jsonl"}, "1 of 1 images do not exist, the first is"),
        (2, {"optim.batch_size": 9}, "there are only 8 rows"),
        (2, {"evaluation.rows": "no.jsonl"}, "no.jsonl: cannot be read"),
        (2, {"out": "taken"}, "out: {tmp}/taken is not writable (Not a directory)"),
        (2, {"data.features": "taken/features"}, "data.features: {tmp}/taken/features is not writable"),
        (2, {"out": "START"}, "is also the folder of 'start', which would be overwritten"),
        (1, {"evaluation.rows": "one.jsonl"}, "evaluation.rows has only one image"),
        (1, {"evaluation.max_rows": 1}, "max_rows is 1; stage 1 compares rows with each other and needs 2 or more"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_computed(
    write_recipe, matching_model, opt_model, pictures, tmp_path, monkeypatch, stage, overrides, problem
):
    no_features(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # nothing may ask the hub
    monkeypatch.setattr("blip2.checkpoint.hub.pull", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "taken").touch()
    (tmp_path / "kept/stage1").mkdir(parents=True)
    (tmp_path / "relative.jsonl").write_text('{"image": "a.png", "caption": "a"}')
    (tmp_path / "one.jsonl").write_text(json.dumps({"image": pictures[0], "captions": ["a dog", "two dogs"]}))
    start = matching_model if stage == 1 else opt_model
    overrides = {key: str(start) if value == "START" else value for key, value in overrides.items()}
    if overrides.get("data.rows"):
        overrides["optim.batch_size"] = 1
        overrides["evaluation.rows"] = "relative.jsonl"
        overrides["evaluation.images"] = "elsewhere"
    with pytest.raises(RecipeError) as raised:
        train.run(write_recipe(stage, start), overrides=overrides)
    assert problem.format(tmp=tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"qformer__query_tokens": 0.0}, "its query tokens are all zero, as in new models of other programs"),
        ({"qformer__query_tokens": 0.5}, "its query tokens are all equal"),
        ({"temperature": 0.0}, "its temperature is 0; it has to be above 0, such as 0.07"),
    ],
)
def test_weights_that_nothing_is_learnt_from(write_recipe, matching_model, tmp_path, monkeypatch, tensors, problem):
    no_features(monkeypatch)
    with pytest.raises(RecipeError, match=problem):
        train.run(write_recipe(1, changed(matching_model, tmp_path, **tensors)))


def test_a_preprocessor_of_another_size(write_recipe, opt_model, tmp_path, monkeypatch):
    no_features(monkeypatch)
    folder = changed(opt_model, tmp_path)
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    with pytest.raises(CheckpointError, match="size is 224, but the model takes images of 32 pixels"):
        train.run(write_recipe(2, folder))


def test_a_finished_run_is_extended(write_recipe, opt_model):
    recipe, seen = write_recipe(2, opt_model), []
    out = train.run(recipe)
    before = weights(out)
    train.run(recipe, report=seen.append)
    assert [progress.message for progress in seen] == [f"{out} is already finished; raise optim.steps to continue"]
    train.run(recipe, report=seen.append, overrides={"optim.steps": 9})
    assert [line["step"] for line in log(out) if "lm" in line] == list(range(1, 10))
    assert not torch.equal(before["qformer.query_tokens"], weights(out)["qformer.query_tokens"])
    assert train.run(recipe, overrides={"optim.steps": 9}) == out


def test_rows_without_the_texts_of_the_stage_are_named(write_recipe, matching_model, opt_model, pictures, tmp_path):
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps({"image": p, "question": "who?", "answer": "me"}) + "\n" for p in pictures))
    with pytest.raises(RecipeError, match=r"picture000\.png: this row has no caption"):
        train.run(write_recipe(1, matching_model), overrides={"data.rows": rows})
    with pytest.raises(RecipeError, match=r"picture000\.png: this row has no text of a kind"):
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
