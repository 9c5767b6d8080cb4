"""Recipes: read strictly, with one line for whoever mistyped."""

from pathlib import Path

import pytest

from blip2.errors import RecipeError
from blip2.train import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
GOOD = """
stage = 2
start = "model"
out = "runs/one"
[data]
rows = "rows.jsonl"
[optim]
steps = 10
batch_size = 4
peak_lr = 1
"""


def write(tmp_path, text=GOOD):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_values_defaults_and_paths(tmp_path):
    recipe = load_recipe(write(tmp_path))
    assert (recipe.stage, recipe.start, recipe.qformer, recipe.evaluation) == (2, "model", None, None)
    assert recipe.out == tmp_path / "runs" / "one"
    assert recipe.data.rows == (tmp_path / "rows.jsonl",)
    assert recipe.optim.peak_lr == 1.0 and isinstance(recipe.optim.peak_lr, float)
    assert (recipe.optim.beta2, recipe.optim.weight_decay, recipe.optim.clip) == (0.98, 0.05, 0.0)
    assert (recipe.data.max_text_tokens, recipe.data.mix.captions) == (32, 1.0)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_as_any_editor_saves_it(tmp_path, encoding):
    path = write(tmp_path)
    path.write_bytes(GOOD.replace("\n", "\r\n").encode(encoding))
    assert load_recipe(path).start == "model"


def test_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    recipe = load_recipe(
        write(tmp_path),
        {"optim.steps": 20, "data": {"mix": {"captions": 0}}, "out": Path("here"), "data.features": "cache"},
    )
    assert (recipe.optim.steps, recipe.optim.batch_size, recipe.data.mix.captions) == (20, 4, 0.0)
    assert recipe.out == Path("/here")
    assert recipe.data.features == tmp_path / "cache"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"stages": 1}, "stages: is not a key of recipes; did you mean stage?"),
        ({"optim.learning_rate": 1}, "optim.learning_rate: is not a key of recipes; the keys are steps,"),
        ({"optim.batchsize": 1}, "optim.batchsize: is not a key of recipes; did you mean optim.batch_size?"),
        ({"data.mix.caption": 1}, "did you mean data.mix.captions?"),
        ({"stage": 3}, "stage: has to be one of 1, 2, not 3"),
        ({"stage": True}, "stage: has to be one of"),
        ({"precision": "fp16"}, "precision: has to be one of 'auto', 'bf16', 'fp32', not 'fp16'"),
        ({"optim.steps": "many"}, "optim.steps: has to be a whole number, not 'many'"),
        ({"optim.steps": 1.5}, "optim.steps: has to be a whole number"),
        ({"optim.steps": True}, "optim.steps: has to be a whole number"),
        ({"optim.peak_lr": "1e-4"}, "optim.peak_lr: has to be a number"),
        ({"start": 1}, "start: has to be a text"),
        ({"out": 1}, "out: has to be a path"),
        ({"data.rows": [1]}, "data.rows: has to be a path"),
        ({"data.rows": []}, "data.rows: is missing or empty"),
        ({"evaluation": 1}, "evaluation: has to be a table"),
        ({"evaluation": {"max_rows": 1}}, "evaluation.rows: is missing"),
        ({"optim.steps": 0}, "optim.steps: has to be at least 1"),
        ({"optim.beta1": 1.0}, "optim.beta1: has to be at least 0 and less than 1"),
        ({"data.mix": {"captions": 0, "questions": 0, "dialogues": 0}}, "data.mix: all kinds of text have the weight"),
        ({"stage": 1, "optim.batch_size": 1}, "a single pair has no negatives"),
        ({"optim.peak_lr": float("nan")}, "optim.peak_lr: has to be a finite number, not nan"),
        ({"optim.clip": 10**400}, "optim.clip: has to be a finite number, not inf"),
        ({"optim.steps": 2**63}, "optim.steps: has to be less than 2^63"),
        ({"optim.steps.x": 1}, "optim.steps.x: names a key inside a value that is not a table"),
        ({"evaluation": {"rows": []}}, "evaluation.rows: is missing or empty"),
        ({"start": ""}, "start: is empty"),
        ({"threads": 10**8}, "threads: has to be at most 1024"),
        ({"evaluation": {"rows": "a", "max_rows": 0}}, "evaluation.max_rows: has to be at least 1"),
        ({"stage": 1, "qformer": "x"}, "qformer: belongs to stage 2"),
        ({"stage": 1, "data.texts_per_image": 2}, "data.texts_per_image: belongs to stage 2"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, overrides, problem):
    with pytest.raises(RecipeError) as raised:
        load_recipe(write(tmp_path), overrides)
    assert problem in str(raised.value)
    assert "recipe.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_keys_and_files(tmp_path):
    with pytest.raises(RecipeError, match="start: is missing"):
        load_recipe(write(tmp_path, GOOD.replace('start = "model"', "")))
    with pytest.raises(RecipeError, match=r"absent\.toml: cannot be read"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(write(tmp_path, "stage = "))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_examples_are_recipes(stage):
    recipe = load_recipe(EXAMPLES / f"stage{stage}.toml")
    assert recipe.stage == stage
    assert (recipe.optim.beta1, recipe.optim.beta2, recipe.optim.weight_decay) == (0.9, 0.98, 0.05)


@pytest.mark.parametrize("data", ['data = "a.tar"', 'data = ["a.tar"]', '[[data]]\nsource = "a.tar"'])
def test_a_collection_may_be_named_in_short(tmp_path, data):
    """And its other values be set on the command line."""
    path = tmp_path / "recipe.toml"
    path.write_text(f'stage = 1\nstart = "s"\nout = "o"\n{data}\n[optim]\nsteps = 1\nbatch_size = 2\n')
    recipe = load_recipe(path, {"data.cleaning": "lavis"})
    assert [source.source for source in recipe.data.sources] == [("a.tar",)] and recipe.data.cleaning == "lavis"
    [source] = load_recipe(path, {"data": tmp_path / "b.tar"}).data.sources
    assert source.source == (str(tmp_path / "b.tar"),)
