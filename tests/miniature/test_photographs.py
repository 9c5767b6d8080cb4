"""The second miniature: its scenes, from stand-ins for the packages, and how it is scored."""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from blip2 import checkpoint
from blip2.errors import CheckpointError
from blip2.qformer import QFormer
from miniature import texts
from miniature.language import make_tokenizer
from miniature.photographs import parts, score, things, world
from miniature.photographs.packages import BACKGROUNDS, STAMPS
from miniature.photographs.rcc import files_in
from miniature.photographs.stamps import held_out, kinds, stamps
from miniature.pretrain import QFORMER


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with an ellipse for each cut-out, in a shape of its own."""
    folder, chance = tmp_path_factory.mktemp("packages"), random.Random(0)
    for files in stamps().values():
        for file in files:
            size = (chance.randint(30, 90), chance.randint(30, 90))
            image = Image.new("RGBA", (size[0] + 10, size[1] + 10))
            ImageDraw.Draw(image).ellipse((5, 5, *size), fill=tuple(chance.randint(0, 255) for _ in range(3)))
            (folder / STAMPS / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / STAMPS / file)
    for name in BACKGROUNDS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((160, 120), 60).convert("RGB").save(folder / name)
    caches = (world._folder, world.cut_out, world.backdrops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(world.PACKAGES, str(folder))
        for cache in caches:
            cache.cache_clear()
        yield folder
    for cache in caches:
        cache.cache_clear()


def test_each_cut_out_has_one_name_and_each_kind_one_that_training_shows():
    files = [file for found in stamps().values() for file in found]
    assert len(files) == len(set(files)) and stamps().keys() == kinds().keys()
    assert all(name == name.lower() == kind.singular for name, kind in kinds().items())
    nouns = Counter(noun for kind in kinds().values() for noun in {kind.singular, kind.plural})
    assert max(nouns.values()) == 1
    for kind, apart in held_out().items():
        assert 0 < len(apart) < len(stamps()[kind]) and set(apart) <= set(stamps()[kind])


@pytest.mark.parametrize("split", world.SPLITS)
def test_scenes_are_what_their_split_says(packages, split):
    apart = {str(file) for files in held_out().values() for file in files}
    for index in range(60):
        scene = world.make_scene(3, split, index)
        assert scene == world.make_scene(3, split, index)
        assert 1 <= len(scene.objects) <= world.MOST_THINGS and max(scene.counts().values()) <= 4
        assert world.has_held_out_pair(list(scene.counts())) == (split == "pairs")
        assert {thing.stamp in apart for thing in scene.objects} == {split in world.UNSEEN}
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height
        for one, other in zip(scene.objects, scene.objects[1:], strict=False):
            assert world._shared(one.box, other.box) <= world.HIDDEN


@pytest.mark.parametrize("split", world.LARGE)
def test_one_large_thing_is_most_of_it_in_the_picture_and_no_two_look_alike(packages, split):
    looks = set()
    for index in range(60):
        scene = world.make_scene(3, split, index)
        [thing] = scene.objects
        x0, y0, x1, y1 = thing.whole
        width, height = thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]
        assert thing.box == (max(0, x0), max(0, y0), min(scene.width, x1), min(scene.height, y1))
        assert width > 0.5 * min(x1 - x0, scene.width) and height > 0.5 * min(y1 - y0, scene.height)
        assert max(width / scene.width, height / scene.height) > 0.4
        looks.add(((x1 - x0) / (y1 - y0), thing.stamp))
        if index < 5:
            assert world.render(scene).tobytes() == world.render(scene).tobytes()
    assert len(looks) == 60


def test_a_picture_shows_the_things_at_their_places(packages):
    changed = 0
    for index in range(20):
        scene = world.make_scene(4, "train", index)
        picture = world.render(scene)
        assert picture.size == (scene.width, scene.height) and picture.mode == "RGB"
        assert picture.tobytes() == world.render(scene).tobytes()
        empty = world.render(world.Scene(scene.width, scene.height, scene.backdrop, scene.look_seed, ()))
        x0, y0, x1, y1 = scene.objects[0].box
        changed += picture.crop((x0, y0, x1, y1)).tobytes() != empty.crop((x0, y0, x1, y1)).tobytes()
    assert changed == 20


def test_texts_are_right_and_ask_for_no_colour(packages):
    for index in range(40):
        scene = world.make_scene(5, "train", index)
        rng = random.Random(index)
        for question in texts.questions(scene, rng):
            assert question.type != "background"
            if question.type == "list":
                assert texts.read_caption(question.answer, score.KIND_OF) == Counter(scene.counts())
        for turns in texts.dialogues(scene, rng):
            assert not any("color" in turn.question for turn in turns)
        assert "background" not in texts.description(scene, rng)


def test_a_split_is_written_whole(packages, tmp_path):
    world.write_split(tmp_path, "stamps", 6, 1, 1, world._write_row)
    rows = score.read(tmp_path / "rows.jsonl")
    assert len(rows) == 6 and all((tmp_path / row["image"]).exists() for row in rows)
    asked = score.rows_of(rows, tmp_path)
    assert {"list", "count", "count_absent", "exist"} <= {row["type"] for row in asked}
    others = score.rows_of(rows, tmp_path, shuffle=True)
    assert [row["question"] for row in asked] == [row["question"] for row in others]
    assert all(one["image"] != other["image"] for one, other in zip(asked, others, strict=True))
    captions = score.rows_of(rows, tmp_path, captions=True)
    assert [row["captions"] for row in captions] == [row["captions"] for row in rows]


def test_lists_are_right_in_any_order_and_nothing_else_is():
    row = {"type": "list", "question": "what do you see?", "answer": "two foxes and a pair of scissors"}
    assert score.is_right(row, "a pair of scissors and two foxes")
    assert not score.is_right(row, "a pair of scissors and a fox") and not score.is_right(row, "two foxes")
    assert not score.is_right({"type": "count", "answer": "two"}, "two foxes")
    rows = [{"type": "count", "question": f"how many {noun} are there?", "answer": answer}
            for noun, answer in (("foxes", "two"), ("mice", "two"), ("keys", "one"))]  # fmt: skip
    assert score.blind(rows).right["count"] == 2


def test_photographs_are_right_by_the_kind_alone():
    rows = [{"image": name, "type": "hammer"} for name in "abcd"]
    table = score.photographs_table(rows, ["a hammer", "two hammers", "a hammer and a saw", "zero"])
    assert "| names the kind, and no other | 2 of 4 | **50.0**" in table
    assert "| names the kind | 3 of 4 | **75.0**" in table and "never right: none" in table


def test_labels_are_ranked_as_they_come():
    """And by the cosine alone."""
    matches = [{"image": f"some/{name.replace('/', '-')}.png", "text": text, "itc_cosine": cosine}
               for name, kind in things.shown().items()
               for text, cosine in (("a badger", 0.3), (texts.with_article(kind), 0.4))]  # fmt: skip
    table = score.labels_table(matches, score.kind_of_photographs())
    assert "| match, best 1 | 0 of 72" in table and "| match, best 5 | 72 of 72" in table
    assert "| ITC alone, best 1 | 72 of 72" in table


def test_labels_of_scenes_of_one_kind_are_ranked_alike():
    rows = [{"image": f"images/00/{name}.jpg", "objects": [{"kind": kind} for kind in kinds]}
            for name, kinds in (("a", ["fox", "fox"]), ("b", ["fox", "key"]), ("c", ["key"]))]  # fmt: skip
    kind_of = score.kind_of_scenes(rows)
    assert kind_of == {"a.jpg": "fox", "c.jpg": "key"}
    matches = [{"image": f"images/00/{name}.jpg", "text": "a fox", "itc_cosine": 0.5} for name in "abc"]
    assert "| match, best 1 | 1 of 2" in score.labels_table(matches, kind_of)


def test_the_photographs_of_the_test_are_listed_once_each():
    names = things.photographs()
    assert len(names) == len(set(names)) == 218
    assert set(things.shown()) <= set(names) and set(things.KINDS) <= set(kinds())
    assert len(things.shown()) == sum(map(len, things.KINDS.values())) == 72


def resource(files: dict[str, bytes], version: int = 3) -> bytes:
    """A Qt resource with these files in a folder, the last one compressed."""
    names, places, data, starts = b"", [], b"", []
    for name in ("folder", *files):
        places.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    for number, content in enumerate(files.values()):
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if number == len(files) - 1 else content
        starts.append(len(data))
        data += struct.pack(">I", len(stored)) + stored
    time = b"" if version < 2 else bytes(8)
    tree = struct.pack(">IHII", 0, 2, 1, 1) + time + struct.pack(">IHII", places[0], 2, len(files), 2) + time
    for number, (place, start) in enumerate(zip(places[1:], starts, strict=True)):
        tree += struct.pack(">IHII", place, number == len(files) - 1, 0, start) + time
    head = 20 + (4 if version > 2 else 0)
    header = b"qres" + struct.pack(">4I", version, head, head + len(tree), head + len(tree) + len(data))
    return header.ljust(head, b"\0") + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_qt_resource_is_read(tmp_path, version):
    files = {"one.webp": b"some bytes", "README": b"text " * 100}
    (tmp_path / "a.rcc").write_bytes(resource(files, version))
    assert dict(files_in(tmp_path / "a.rcc")) == {f"folder/{name}": content for name, content in files.items()}
    (tmp_path / "b.rcc").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"b\.rcc: is no Qt resource"):
        list(files_in(tmp_path / "b.rcc"))


def test_it_is_found_once_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="make photographs"):
        checkpoint.resolve("photographs")
    made = tmp_path / "blip2/photographs"
    for name in ("generative", "matching"):
        (made / name).mkdir(parents=True)
    assert checkpoint.resolve("photographs") == made / "generative"
    assert checkpoint.resolve("photographs-itm") == made / "matching"


def test_the_queries_begin_with_the_principal_directions_of_the_classifier(packages):
    chance = torch.Generator().manual_seed(0)
    classes = torch.randn(1000, 1280, generator=chance) * torch.linspace(2, 0.01, 1280)
    (packages / parts.ENCODER).mkdir(parents=True, exist_ok=True)
    file = packages / parts.ENCODER / "lite.pth"
    torch.save({"_fc.weight": classes}, file)
    qformer = QFormer(replace(QFORMER, encoder_hidden_size=1280))
    parts.begin(qformer, packages)
    file.unlink()
    looking = [layer.cross_attention for layer in qformer.layers if layer.cross_attention]
    read = torch.cat([attention.value.weight for attention in looking]) / parts.VALUE_SCALE
    assert torch.allclose(read @ read.T, torch.eye(len(read)), atol=1e-4)
    told = ((classes - classes.mean(0)) @ read.T).square().sum(0)
    assert told.diff().max() < 1e-2 * told[0] and told[0] > 5 * told[-1]
    for name, weight in qformer.named_parameters():
        if weight.dim() > 1 and "cross_attention.value" not in name:
            assert weight.std().item() == pytest.approx(0.04, rel=0.1)  # BERT's 0.02 is for four times the width


def test_the_language_model_keeps_what_it_knew(packages):
    tokenizer = make_tokenizer(60, parts.VOCAB_SIZE, world.make_scene)
    model = parts.from_miniature(tokenizer)
    folder = checkpoint.resolve("miniature")
    bundled = checkpoint.load(folder, dtype=torch.float32).language
    old = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for word in ("</s>", "\u0120how", "\u0120two"):
        table = model.token_embedding.weight
        assert torch.equal(table[tokenizer.token_to_id(word)], bundled.token_embedding.weight[old.token_to_id(word)])
    assert torch.equal(model.blocks[0].qkv.weight, bundled.blocks[0].qkv.weight)
