"""Runs that learn from collections: what is read in each step, by how many processes ever, and how a run goes on."""

import io
import json

import numpy as np
import pytest
import torch

from blip2 import checkpoint, train
from blip2.data import BadImages
from blip2.errors import RecipeError
from blip2.train import load_recipe
from blip2.train.check import gather
from blip2.train.reading import RowSet
from tests.collection.written import jpeg, sample, shards, tar
from tests.train.written import write


def final(folder):
    return checkpoint.load(folder).state_dict()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path, matching_model, opt_model, stage):
    """As if it had not stopped, of two collections with weights."""
    shards(tmp_path / "s", [9, 6])
    shards(tmp_path / "t", [5])
    data = '[[data]]\nsource = "s/{00000..00001}.tar"\nweight = 2\n[[data]]\nsource = "t"\n'
    if stage == 2:
        data = "[data]\nmax_prompt_tokens = 64\n" + data.replace("[[data]]", "[[data.sources]]")
    start = matching_model if stage == 1 else opt_model
    whole = train.run(write(tmp_path / "whole.toml", data, start, stage))
    parts = write(tmp_path / "parts.toml", data, start, stage)

    def stop(progress):
        if progress.phase == "checkpoint" and progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(parts, report=stop)
    told = []
    found = final(train.run(parts, report=told.append))
    assert not [progress for progress in told if progress.phase == "rows"], "what was found is not looked for again"
    for name, value in final(whole).items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("data", ['data = "s/{00000..00001}.tar"', 'data = ["s/00000.tar", "s/0*1.tar"]', 'data = "s"'])
def test_a_collection_by_its_name_alone(tmp_path, matching_model, data):
    shards(tmp_path / "s", [5, 5])
    told = []
    out = train.run(write(tmp_path / "a.toml", data, matching_model, steps=2), report=told.append)
    assert checkpoint.load(out) is not None
    assert next(progress.message for progress in told if progress.phase == "rows").endswith(" rows")


def test_bad_pictures_are_passed_over(tmp_path, matching_model):
    members = [member for number in range(6) for member in sample(number, txt=f"dog {number}")]
    members[2] = (members[2][0], b"no picture")
    tar(tmp_path / "a.tar", dict(members))
    told = []
    train.run(write(tmp_path / "a.toml", 'data = "a.tar"', matching_model), report=told.append)
    assert "unreadable images: 1, skipped" in told[-1].message
    assert "a.tar: 000001: " in (tmp_path / "a" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ('data = "absent.tar"', "absent.tar: no such file"),
        ("data = []", "data.rows: is missing or empty"),
        ('data = ""', "data.sources: has a source without a path"),
        ('[data]\nrows = "a.jsonl"\nsources = "s"', "data.sources: cannot be combined with data.rows"),
        ('[[data]]\nsource = "s"\nweight = 0', "data.sources.weight: has to be above 0"),
        ('[[data]]\nsource = "s"\nquestion = "q"', "needs both 'question' and 'answer'"),
        ('[[data]]\nsource = "s"\nwieght = 2', "data.sources.wieght: is not a key of recipes; did you mean"),
        ("[[data]]\nweight = 2", "data.sources.source: is missing"),
        ('[data]\nsources = "s"\nimages = "i"', "data.images: belongs to rows"),
        ('data = "https://a.b/c.tar"', "only images can be read from URLs; download it first"),
        ('data = "pipe:cat s.tar"', "is not supported, and no command is run"),
        ('[data]\nsources = "s"\nfeatures_dtype = "int8"', "data.features_dtype: applies to features on the disk;"),
        ('[data]\nsources = "s"\nfeatures = "f"\nfeatures_dtype = "bf16"', "data.features_dtype: has to be one of"),
        ('data = ["s", "t"]', "optim.batch_size is 4, but there are only 3 rows"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, matching_model, data, problem):
    shards(tmp_path / "s", [5])
    shards(tmp_path / "t", [3])
    with pytest.raises(RecipeError) as raised:
        train.run(write(tmp_path / "a.toml", data, matching_model))
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_features_are_kept_of_a_folder(tmp_path, matching_model):
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "photos" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{number}.jpg,dog {number}\n" for number in range(5))
    )
    data = '[data]\nsources = "photos"\nfeatures = "f"'
    train.run(write(tmp_path / "a.toml", data, matching_model))
    assert [path.name for path in (tmp_path / "f").glob("*.bin")]


@pytest.fixture
def row_set(tmp_path, matching_model):
    """``row_set(data)`` reads what a recipe with this data names."""

    def made(data, **overrides):
        recipe = load_recipe(write(tmp_path / "a.toml", data, matching_model), overrides)
        materials = gather(recipe, tmp_path / "a.toml")
        model = checkpoint.load(matching_model)
        bad, augment = BadImages("skip"), recipe.data.augment
        return RowSet(materials.train_rows, [], model.vision, materials.settings, recipe, bad, augment)

    return made


@pytest.mark.parametrize("augment", ["true", '"randaugment"'])
def test_processes_that_share_a_batch_read_what_one_would(row_set, tmp_path, augment):
    """Also where an image cannot be read, and images are augmented."""
    members = [member for number in range(9) for member in sample(number, txt=f"dog {number}")]
    members[4] = (members[4][0], b"no picture")
    tar(tmp_path / "a.tar", dict(members))
    shards(tmp_path / "s", [5])
    data = f'[data]\naugment = {augment}\nsources = ["a.tar", "s"]'
    whole, others = row_set(data), [row_set(data), row_set(data)]
    for step in (7, 3, 4, 5):
        numbers, pixels = whole.read(whole.draws(step))
        halves = [other.read(other.draws(step)[rank * 2 : rank * 2 + 2]) for rank, other in enumerate(others)]
        assert np.array_equal(numbers, np.concatenate([half for half, _ in halves]))
        assert torch.equal(pixels, torch.cat([half for _, half in halves]))
        assert 2 not in numbers


def test_randaugment_goes_on_from_the_part_that_is_shown(row_set, tmp_path, monkeypatch):
    """Of the model's size already; without changes it is what the part alone would be."""
    shards(tmp_path / "s", [5])
    data, sizes = '[data]\nsources = "s"\naugment = {}', []
    monkeypatch.setattr("blip2.data.loader.randaugmented", lambda image, chance: sizes.append(image.size) or image)
    part, further = row_set(data.format("true")), row_set(data.format('"randaugment"'))
    assert torch.equal(part.read(part.draws(0))[1], further.read(further.draws(0))[1])
    assert sizes == [(32, 32)] * 4


def test_an_augmented_picture_is_another_one_in_each_epoch(row_set, tmp_path):
    tar(tmp_path / "a.tar", dict(pair for n in range(4) for pair in (_large(n), (f"{n:06}.txt", b"dog"))))
    plain, moving = row_set('data = "a.tar"'), row_set('[data]\nsources = "a.tar"\naugment = true')
    for rows, is_still in ((plain, True), (moving, False)):
        (first, seen), (second, again) = (rows.read(rows.draws(step)) for step in (0, 1))
        assert torch.equal(seen[np.argsort(first)], again[np.argsort(second)]) == is_still
    held_out = row_set('[data]\nsources = "a.tar"\naugment = true', **{"data.augment": False})
    assert torch.equal(held_out.read(np.arange(4))[1], plain.read(np.arange(4))[1])


def _large(number):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    return f"{number:06}.png", file.getvalue()


def test_evaluation_shows_whole_pictures(tmp_path, matching_model, monkeypatch):
    shards(tmp_path / "s", [6])
    seen = []
    monkeypatch.setattr("blip2.data.loader.augmented", lambda image, chance: seen.append(chance) or image)
    data = '[data]\nsources = "s"\naugment = true\n[evaluation]\nsources = "s"\nmax_rows = 4'
    train.run(write(tmp_path / "a.toml", data, matching_model, steps=2))
    assert len(seen) in (8, 12)  # two steps of four, and one that was read ahead
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["evaluation"].keys() >= {"itc", "matching"} for line in log if "evaluation" in line] == [True]


def test_texts_are_cleaned_where_the_recipe_says_so(row_set, tmp_path, rows):
    tar(tmp_path / "a.tar", dict(member for n in range(4) for member in sample(n, txt="A (red) Dog.")))
    assert row_set('[data]\nsources = "a.tar"\ncleaning = "lavis"').rows[0].captions == ("a red dog",)
    assert row_set('[data]\nsources = "a.tar"').rows[0].captions == ("A (red) Dog.",)
    rows.write_text(rows.read_text().replace("two dogs and", "Two DOGS! and"))
    cleaned = row_set(f'[data]\nrows = "{rows}"\ncleaning = "lavis"').rows[0].captions
    assert cleaned[0].startswith("two dogs and") and "DOGS!" in rows.read_text()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ('rows = "a"\naugment = true\nfeatures = "f"', "data.augment: crops images differently at each step"),
        ('rows = "a"\naugment = 1', "data.augment: has to be one of false, true, 'randaugment', not 1"),
        ('rows = "a"\naugment = "strong"', "data.augment: has to be one of false, true, 'randaugment', not 'strong'"),
        ('rows = "a"\naugment = "randaugment"\nfeatures = "f"', "data.augment: crops images differently"),
        ('rows = "a"\ncleaning = "blip"', "data.cleaning: has to be one of 'none', 'lavis'"),
    ],
)
def test_what_of_it_cannot_be(tmp_path, data, problem):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write(tmp_path / "a.toml", f"[data]\n{data}", "start"))
