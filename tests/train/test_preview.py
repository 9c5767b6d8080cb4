"""What a training will do is told beforehand as it will be, and a few rows are learnt by heart."""

import json
import sys
from pathlib import Path

import pytest
import torch

from blip2 import checkpoint, train
from blip2.data import Row, Turn
from blip2.errors import OptionError, RecipeError
from blip2.train import overfit, preview
from blip2.train.overfit import Verdict, _record
from blip2.train.preview import BYTES_LEARNING
from blip2.train.state import STATE
from tests.train.conftest import COLOURS


@pytest.mark.parametrize("settings", [{}, {"lora.rank": 3}, {"lora.rank": 3, "lora.trains_qformer": True}])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_learns_is_what_a_training_keeps_the_state_of(
    write_recipe, matching_model, any_model, tmp_path, stage, settings
):
    if stage == 1 and settings:
        settings = {**settings, "lora.parts": "qformer", "lora.trains_qformer": False}
    recipe = write_recipe(stage, matching_model if stage == 1 else any_model)
    found = preview(recipe, overrides=settings)
    assert not (tmp_path / f"out{stage}").exists() and not (tmp_path / "features").exists()
    out = train.run(recipe, overrides={"optim.steps": 1, **settings})
    state = checkpoint.reader.places_in(out / "training" / STATE)
    learnt = {name: place for name, place in state.items() if name.startswith("model.")}
    assert found.learning == sum(torch.Size(place.shape).numel() for place in learnt.values())
    assert found.parts["vision"][0] == (32 if settings.get("lora.trains_qformer", not settings) else 0)
    lines = list(found.lines())
    assert "rows: 8 with 8 images" in lines
    assert "steps: 6 of 4 images, 2.0 an epoch, 3.0 epochs" in lines
    assert "evaluation: 8 rows, every 3 steps" in lines
    [memory] = [line for line in lines if line.startswith("memory: ")]
    assert f"{found.learning * BYTES_LEARNING / 1e6:.1f} MB more for training" in memory


@pytest.mark.parametrize("base", ["fp32", "int8", "int4"])
def test_a_base_of_few_bits_has_as_many_numbers(write_recipe, any_model, base):
    found = preview(write_recipe(2, any_model), overrides={"lora.base": base})
    model = checkpoint.load(any_model)
    frozen = sum(each.numel() for each in model.language.parameters())
    has_copy = base != "fp32" and model.config.language.family == "opt"  # the head beside the table
    table = model.language.token_embedding.weight.numel() if has_copy else 0
    assert found.parts["language"] == (0, frozen + table)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_batch_is_the_one_that_comes_first(write_recipe, matching_model, any_model, monkeypatch, stage):
    recipe = write_recipe(stage, matching_model if stage == 1 else any_model)
    found = preview(recipe)
    drawn = []

    class Enough(Exception):
        pass

    def take(task, *_, **__):
        drawn.append(task.make_batch(0, range(4)))
        raise Enough

    monkeypatch.setattr(sys.modules["blip2.train.run"], "train", take)
    with pytest.raises(Enough):
        train.run(recipe)
    [batch] = drawn
    assert len(found.texts) == (4 if stage == 1 else 12)
    if stage == 2:
        assert [said.kind for said in found.texts] == batch.kinds
        assert all(any(word in said.read + said.written for word in (*COLOURS, "two", "yes")) for said in found.texts)
    else:
        tokenizer = found.materials.tokenizer
        for said, ids_T, mask_T in zip(found.texts, batch.text_BT, batch.text_mask_BT, strict=True):
            assert tokenizer.matching_ids(said.written, 32, truncate=True) == ids_T[mask_T].tolist()


def test_the_sheet_shows_pictures_and_says_what_cannot_be_opened(write_recipe, opt_model, rows, pictures):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[0]["image"] = str(rows.parent / "gone.png")
    lines[1]["captions"] = ["<b>two</b> dogs"] * 2
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sheet = preview(write_recipe(2, opt_model), overrides={"optim.batch_size": 8}).sheet()
    assert sheet.count("data:image/jpeg;base64,") == 7
    assert "gone.png" in sheet and "<b>two" not in sheet


def test_what_cannot_be_carried_out_is_told(write_recipe, opt_model):
    with pytest.raises(RecipeError, match="there are only 8 rows"):
        preview(write_recipe(2, opt_model), overrides={"optim.batch_size": 9})


@pytest.mark.parametrize("stage", [1, 2])
def test_a_few_rows_are_learnt_by_heart(write_recipe, matching_model, opt_model, tmp_path, stage):
    recipe = write_recipe(stage, matching_model if stage == 1 else opt_model)
    before = set(tmp_path.iterdir())
    seen = []
    fast = {"optim.steps": 90, "optim.peak_lr": 0.01}
    if stage == 2:  # a random language model is not spoken to by queries alone
        fast |= {"lora.rank": 16, "lora.trains_qformer": True, "lora.dropout": 0.0}
    verdict = overfit(recipe, 3, report=seen.append, overrides=fast)
    assert verdict.is_learnt and verdict.rows == 3 and verdict.steps == 90
    assert verdict.last < 0.5 * verdict.first
    assert str(verdict).startswith("memorised: the loss of 3 rows went from")
    assert {progress.phase for progress in seen} == {"features", "train"}
    assert set(tmp_path.iterdir()) == before, "nothing of it stays"


def test_what_is_not_learnt_is_said(write_recipe, opt_model):
    verdict = overfit(write_recipe(2, opt_model), 2, report=lambda _: None, overrides={"optim.peak_lr": 0.0})
    assert not verdict.is_learnt and "not memorised: the loss of 2 rows went from" in str(verdict)
    with pytest.raises(OptionError, match="overfit is 0"):
        overfit(write_recipe(2, opt_model), 0, report=lambda _: None)


def test_a_small_loss_need_not_fall():
    assert Verdict(2, 9, 0.05, 0.06, {}).is_learnt and not Verdict(2, 9, 1.0, 0.6, {}).is_learnt


def test_one_text_of_a_kind():
    turns = (Turn("who?", "me"), Turn("where?", "here"))
    assert _record(Row("/a.png", ("one", "two"), turns, (turns, turns)), Path("/none")) == {
        "image": "/a.png",
        "captions": ("one",),
        "questions": [{"question": "who?", "answer": "me"}],
        "dialogues": [[{"question": "who?", "answer": "me"}]],
    }
