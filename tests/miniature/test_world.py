"""The miniature world: scenes keep their rules, and every text agrees with the objects."""

import collections
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniature import glyphs, language, texts, vision, world

pytestmark = pytest.mark.skipif(not world.FONT_PATH.exists(), reason="needs fonts-noto-color-emoji")

ROOT = Path(__file__).parents[2]
SCENES_A_SPLIT = 300
WORD_TO_NUMBER = {word: number for number, word in enumerate(texts.NUMBERS)}
NOUN_TO_KIND = {noun: kind.singular for kind in texts.KINDS.values() for noun in (kind.singular, kind.plural)}


@pytest.fixture(scope="module")
def scenes():
    """Of every split that has texts."""
    splits = [split for split, mix in world.SPLITS.items() if mix.has_texts]
    return {split: [world.make_scene(7, split, index) for index in range(SCENES_A_SPLIT)] for split in splits}


@pytest.fixture(scope="module")
def all_scenes(scenes):
    return [scene for split in scenes.values() for scene in split]


def all_texts(scene, seed=0):
    rng = world.make_rng(seed, "texts")
    return (
        texts.captions(scene, rng),
        texts.questions(scene, rng),
        texts.dialogues(scene, rng),
        texts.description(scene, rng),
    )


# Independent readings of a scene: these use the boxes alone.


def count_of(scene, kind):
    return sum(thing.kind == kind for thing in scene.objects)


def place_of(scene, kind, axis):
    """left/right (axis 0) or top/bottom (axis 1) where all centres agree beyond the middle band."""
    extent = (scene.width, scene.height)[axis]
    places = set()
    for thing in scene.objects:
        if thing.kind == kind:
            doubled_centre = thing.box[axis] + thing.box[axis + 2]
            low, high = doubled_centre < 0.9 * extent, doubled_centre > 1.1 * extent
            places.add(0 if low else 1 if high else None)
    if len(places) != 1 or None in places:
        return None
    return (("left", "right"), ("top", "bottom"))[axis][places.pop()]


def read_phrase(phrase):
    """ "two dogs" -> ("dog", 2), with the grammar of number and article checked."""
    number, noun = phrase.split()
    kind = texts.KINDS[NOUN_TO_KIND[noun]]
    if number in ("a", "an"):
        assert noun == kind.singular
        assert number == ("an" if noun in ("apple", "airplane", "elephant", "umbrella") else "a")
        return kind.singular, 1
    assert noun == kind.plural and WORD_TO_NUMBER[number] >= 2
    return kind.singular, WORD_TO_NUMBER[number]


def read_caption(caption):
    caption = re.sub(r"^there (is|are) ", "", caption)
    phrases = re.split(r", | and ", caption)
    assert caption.count(" and ") == min(1, len(phrases) - 1)
    return dict(map(read_phrase, phrases))


def kind_in(question):
    nouns = [word for word in re.findall(r"[a-z]+", question) if word in NOUN_TO_KIND]
    assert len(nouns) == 1, question
    return NOUN_TO_KIND[nouns[0]]


def check_answer(scene, question):
    """Recompute the answer of a question that stands by itself."""
    present = {kind: count_of(scene, kind) for kind in texts.KINDS if count_of(scene, kind)}
    words, answer = question.question, question.answer
    if question.type in ("count", "count_absent"):
        number = present.get(kind_in(words), 0)
        assert (number == 0) == (question.type == "count_absent")
        assert answer == texts.NUMBERS[number]
    elif question.type == "exist":
        assert answer == ("yes" if kind_in(words) in present else "no")
    elif question.type == "background":
        assert answer == scene.background
    elif question.type in ("side", "height"):
        kind = kind_in(words)
        assert answer == place_of(scene, kind, 0 if question.type == "side" else 1)
        assert bool(re.search(r"\bis the\b", words)) == (present[kind] == 1)
    elif question.type == "list":
        assert read_caption(answer) == present
    else:
        assert question.type == "where"
        asked = re.search(r"left|right", words)[0]
        sides = {kind: place_of(scene, kind, 0) for kind in present}
        assert None not in sides.values()
        assert [kind for kind, side in sides.items() if side == asked] == [read_phrase(answer)[0]]
        assert read_phrase(answer)[1] == present[read_phrase(answer)[0]]


def check_dialogue(scene, turns):
    """Follow the dialogue as a listener would: what is asked, and of which kind."""
    assert 2 <= len(turns) <= 4
    assert turns[0].type in texts.QUESTION_TYPES
    check_answer(scene, turns[0])
    asking, topic = turns[0].type, None
    if asking not in ("list", "background"):
        topic = kind_in(turns[0].question)
    for turn in turns[1:]:
        assert turn.type == "followup"
        words = turn.question
        if any(noun in NOUN_TO_KIND for noun in re.findall(r"[a-z]+", words)):
            topic = kind_in(words)
        if "how many" in words:
            asking = "count"
        elif "side" in words:
            asking = "side"
        elif "top" in words:
            asking = "height"
        elif "color" in words:
            asking = "background"
        number = count_of(scene, topic) if topic else 0
        if re.search(r"\b(it|they)\b", words):
            assert ("it" in words.split()) == (number == 1)
        expected = {
            "count": texts.NUMBERS[number],
            "exist": "yes" if number else "no",
            "side": number and place_of(scene, topic, 0),
            "height": number and place_of(scene, topic, 1),
            "background": scene.background,
        }[asking]
        assert turn.answer == expected, (scene, turns)


def test_held_out_pairs_cover_every_kind_evenly():
    pairs = world.held_out_pairs()
    uses = collections.Counter(kind for pair in pairs for kind in pair)
    everything = len(texts.KINDS) * (len(texts.KINDS) - 1) / 2
    assert all(len(pair) == 2 for pair in pairs)
    assert abs(len(pairs) - everything / 10) < 1
    assert set(uses) == set(texts.KINDS)
    assert max(uses.values()) <= 4


def test_splits_keep_or_show_held_out_pairs(scenes):
    for split, members in scenes.items():
        for scene in members:
            pairs = itertools.combinations({thing.kind for thing in scene.objects}, 2)
            shows = any(frozenset(pair) in world.held_out_pairs() for pair in pairs)
            assert shows == (split in ("test", "glyphs"))
            if split not in ("train", "varied"):
                assert 2 <= len(scene.counts()) <= 3


def test_splits_differ_and_an_unknown_one_is_refused():
    assert world.make_scene(1, "train", 0) != world.make_scene(1, "familiar", 0)
    with pytest.raises(ValueError, match="validation"):
        world.make_scene(1, "validation")


def test_scene_rules(all_scenes):
    for scene in all_scenes:
        short = min(scene.width, scene.height)
        assert short >= 112 and max(scene.width, scene.height) <= 448
        assert max(scene.width, scene.height) / short <= 4 / 3 + 0.01
        assert scene.background in world.BACKGROUNDS and scene.style in world.STYLES
        counts = collections.Counter(thing.kind for thing in scene.objects)
        assert 1 <= len(counts) <= 3
        assert set(counts.values()) <= {1, 2, 3, 4}
        assert len(scene.objects) <= 8
        sides = []
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height
            sides.append(max(x1 - x0, y1 - y0))
        assert min(sides) >= 0.17 * short - 1 and max(sides) <= 0.34 * short + 1
        assert max(sides) / min(sides) < 1.7
        for first, second in itertools.combinations((thing.box for thing in scene.objects), 2):
            apart_across = first[2] <= second[0] or second[2] <= first[0]
            apart_down = first[3] <= second[1] or second[3] <= first[1]
            assert apart_across or apart_down


def test_scenes_vary(scenes):
    members = scenes["train"]
    share = collections.Counter(len(scene.counts()) for scene in members)
    assert share[1] > 40 and share[2] > 90 and share[3] > 50
    assert {scene.background for scene in members} == set(world.BACKGROUNDS)
    assert {scene.style for scene in members} == set(world.STYLES)
    assert {kind for scene in members for kind in scene.counts()} == set(texts.KINDS)
    numbers = collections.Counter(number for scene in members for number in scene.counts().values())
    assert min(numbers[number] for number in (1, 2, 3, 4)) > 0.12 * sum(numbers.values())
    sided = [scene for scene in members if all(place_of(scene, kind, 0) for kind in scene.counts())]
    assert len(sided) > 60


def test_same_seed_same_scene_picture_and_texts():
    first, second = (world.make_scene(3, "test", 5) for _ in range(2))
    assert first == second
    assert world.render(first).tobytes() == world.render(second).tobytes()
    assert all_texts(first) == all_texts(second)


def test_same_seed_same_scene_in_another_process():
    program = (
        "import random, zlib; from miniature import texts, world; scene = world.make_scene(3, 'train', 9);"
        "rng = random.Random(1);"
        "print(scene, texts.captions(scene, rng), texts.dialogues(scene, rng), texts.description(scene, rng),"
        " zlib.crc32(world.render(scene).tobytes()), sorted(map(sorted, world.held_out_pairs())))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert repr(world.make_scene(3, "train", 9)) in outputs[0].stdout


@pytest.fixture(scope="module")
def crowd():
    return [world.make_scene(7, "crowd", index) for index in range(SCENES_A_SPLIT)]


def test_crowds_show_strangers_and_more_kinds_but_no_held_out_pair(crowd):
    numbers, shown = collections.Counter(), set()
    for scene in crowd:
        counts = scene.counts()
        assert not world.has_held_out_pair(list(counts))
        assert max(counts.values()) <= 4 and len(scene.objects) <= 10
        numbers[len(counts)] += 1
        shown |= set(counts)
    assert set(numbers) == {1, 2, 3, 4, 5, 6}
    assert shown >= set(texts.KINDS)
    assert shown - set(texts.KINDS) <= set(glyphs.STRANGERS) and len(shown) > 100


def test_a_crowd_is_written_with_its_objects_and_without_texts(tmp_path):
    world.write_split(tmp_path, "crowd", 10, seed=2, workers=1)
    for index, line in enumerate((tmp_path / "rows.jsonl").read_text().splitlines()):
        row = json.loads(line)
        assert [thing["kind"] for thing in row["objects"]] == [
            thing.kind for thing in world.make_scene(2, "crowd", index).objects
        ]
        assert not {"captions", "questions", "dialogues"} & set(row)
    world.draw_sheet(tmp_path / "sheet.png", "crowd", seed=1, columns=1, rows=1)


def test_which_splits_draw_a_kind_in_other_ways(scenes):
    other = {
        split: [bool(thing.glyph) for scene in members for thing in scene.objects] for split, members in scenes.items()
    }
    assert not any(other["train"] + other["test"] + other["familiar"])
    assert 0.1 < np.mean(other["varied"]) < 0.4 < np.mean(other["glyphs"])
    for scene in scenes["glyphs"]:
        for thing in scene.objects:
            assert thing.glyph in ("", *glyphs.OTHERS.get(thing.kind, ""))


def test_varied_scenes_have_more_on_one_side(scenes):
    sided = {
        split: sum(bool(scene.side(kind)) for scene in scenes[split] for kind in scene.counts())
        / sum(len(scene.counts()) for scene in scenes[split])
        for split in ("train", "varied")
    }
    assert sided["varied"] > sided["train"] + 0.03


def test_varied_questions_are_also_written_as_people_type_them(tmp_path):
    shares = {}
    for split in ("varied", "test"):
        world.write_split(tmp_path / split, split, 40, seed=2, workers=1)
        asked = []
        for line in (tmp_path / split / "rows.jsonl").open():
            row = json.loads(line)
            asked += [turn["question"] for turn in itertools.chain(row["questions"], *row["dialogues"])]
        shares[split] = np.mean([(not text.endswith("?"), text[0].isupper()) for text in asked], axis=0)
    assert (shares["test"] == 0).all()
    assert (shares["varied"] > 0.15).all() and (shares["varied"] < 0.35).all()


def test_documents_for_the_second_pass_ask_in_both_ways_and_answer_the_same():
    plain, typed = (language.segments(3, "train", as_typed=share) for share in (0.0, 1.0))
    ask = [[text for text, weight in pieces if weight == 0.1 and "Answer" not in text] for pieces in (plain, typed)]
    assert all(text.endswith("?") for text in ask[0])
    assert any(not text.endswith("?") for text in ask[1]) and any(text[1].isupper() for text in ask[1])


def test_no_drawing_stands_for_two_things():
    drawings = [chr(kind.code_point) for kind in texts.KINDS.values()]
    drawings += [*glyphs.STRANGERS, *"".join(glyphs.OTHERS.values())]
    assert len(drawings) == len(set(drawings))
    assert set(glyphs.OTHERS) <= set(texts.KINDS)


@pytest.mark.parametrize("kind", [*texts.KINDS, *glyphs.STRANGERS, *"".join(glyphs.OTHERS.values())])
def test_every_kind_draws(kind):
    for angle in (world.ANGLES[0], 0):
        sprite = world.sprite(kind, angle)
        alpha = np.asarray(sprite.getchannel("A"))
        assert max(sprite.size) > 100
        assert (alpha > 128).mean() > 0.15  # a missing glyph would be an empty or hollow box
        assert len(np.unique(np.asarray(sprite)[alpha > 128], axis=0)) > 10


def test_kinds_look_different():
    thumbnails = {kind: np.asarray(world.sprite(kind).resize((16, 16)), dtype=float) for kind in texts.KINDS}
    for first, second in itertools.combinations(thumbnails.values(), 2):
        assert np.abs(first - second).mean() > 15


def test_missing_font_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "FONT_PATH", tmp_path / "none.ttf")
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        glyphs.sprite.__wrapped__("dog")


@pytest.mark.parametrize("kind", texts.KINDS)
def test_article(kind):
    vowel = kind in ("apple", "airplane", "elephant", "umbrella")
    assert texts.with_article(kind) == ("an " if vowel else "a ") + kind


def test_captions_name_every_kind_with_its_count(all_scenes):
    for scene in all_scenes:
        captions = all_texts(scene)[0]
        assert len(captions) == 2
        for caption in captions:
            assert read_caption(caption) == scene.counts()
            assert caption == caption.lower() and caption[-1].isalpha()


def test_answers_agree_with_the_objects(all_scenes):
    asked = collections.Counter()
    for scene in all_scenes:
        menu = all_texts(scene)[1]
        for question in menu:
            check_answer(scene, question)
            assert question.question == question.question.lower() and question.question[-1] == "?"
        exist = collections.Counter(question.answer for question in menu if question.type == "exist")
        assert exist == {"yes": 2, "no": 2}
        asked.update(question.type for question in menu)
        sure = {"count", "count_absent", "exist", "background", "list"}
        assert sure <= {question.type for question in menu}
    assert set(asked) == set(texts.QUESTION_TYPES)


def test_every_clear_place_is_asked(all_scenes):
    for scene in all_scenes:
        menu = all_texts(scene)[1]
        for axis, question_type in enumerate(("side", "height")):
            asked = {kind_in(question.question) for question in menu if question.type == question_type}
            assert asked == {kind for kind in scene.counts() if place_of(scene, kind, axis)}


def test_ask_and_sample(all_scenes):
    rng = random.Random(0)
    for scene in all_scenes[:100]:
        types = {question.type for question in texts.questions(scene, rng)}
        for question_type in texts.QUESTION_TYPES:
            question = texts.ask(scene, rng, question_type)
            assert (question is not None) == (question_type in types)
            assert question is None or question.type == question_type
        sample = texts.sample_questions(scene, rng, 9)
        assert len(sample) == 9
        assert {question.type for question in sample} == types


def test_dialogues_agree_with_the_objects(all_scenes):
    for scene in all_scenes:
        dialogues = all_texts(scene)[2]
        assert len(dialogues) >= 4
        for turns in dialogues:
            check_dialogue(scene, turns)


def test_descriptions_hold_every_fact(all_scenes):
    for scene in all_scenes:
        description = all_texts(scene)[3]
        assert len(description.split()) <= 24
        facts = set(re.split(r" [,;] ", description))
        expected = {f"{scene.background} background"}
        for kind, number in collections.Counter(thing.kind for thing in scene.objects).items():
            noun = texts.KINDS[kind].singular if number == 1 else texts.KINDS[kind].plural
            places = [place for axis in (0, 1) if (place := place_of(scene, kind, axis))]
            expected.add(" ".join([texts.NUMBERS[number], noun, *places]))
        assert facts == expected


def looks_like(name, red, green, blue):
    high, low = max(red, green, blue), min(red, green, blue)
    return {
        "white": low > 225,
        "black": high < 50,
        "gray": high - low < 25 and 90 < high < 170,
        "green": green == high and green - max(red, blue) > 25,
        "blue": blue == high and red < green < blue and blue - red > 60,
        "yellow": red - blue > 70 and green - blue > 50,
        "pink": red == high and low == green and red > 230 and red - green > 40 and blue < red - 20,
        "purple": blue == high and low == green and blue - green > 40 and red < 205,
    }[name]


def test_background_pixels_have_the_named_color(scenes):
    for scene in scenes["train"]:
        image = world.render(scene)
        assert image.mode == "RGB" and image.size == (scene.width, scene.height)
        pixels = np.asarray(image).astype(int)
        free = np.ones(pixels.shape[:2], dtype=bool)
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            assert np.ptp(pixels[y0:y1, x0:x1].reshape(-1, 3), axis=0).max() > 40  # something is drawn there
            free[y0:y1, x0:x1] = False
        color = pixels[free].mean(axis=0).round()
        assert [name for name in world.BACKGROUNDS if looks_like(name, *color)] == [scene.background], color


def test_write_split(tmp_path, capsys):
    world.write_split(tmp_path, "familiar", 40, seed=2, workers=2)
    assert "40/40" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert {row["image"][-3:] for row in rows} == {"jpg", "png"}
    for index, row in enumerate(rows):
        assert row["image"].startswith(f"images/00/{index:06d}.")
        scene = world.make_scene(2, "familiar", index)
        with Image.open(tmp_path / row["image"]) as image:
            assert image.size == (row["width"], row["height"]) == (scene.width, scene.height)
            difference = np.asarray(image.convert("RGB"), dtype=int) - np.asarray(world.render(scene), dtype=int)
            assert np.abs(difference).mean() < (8 if row["image"].endswith("jpg") else 1e-9)
        assert [(thing["kind"], tuple(thing["box"])) for thing in row["objects"]] == [
            (thing.kind, thing.box) for thing in scene.objects
        ]
        assert row["background"] == scene.background
        assert [read_caption(caption) for caption in row["captions"]] == [scene.counts()] * 2
        assert 8 <= len(row["questions"]) <= 12 and len(row["dialogues"]) == 3
        for question in row["questions"]:
            check_answer(scene, texts.Question(**question))
        for turns in row["dialogues"]:
            check_dialogue(scene, [texts.Question(**turn) for turn in turns])


def test_sheet(tmp_path):
    world.draw_sheet(tmp_path / "sheet.png", "test", seed=1, columns=2, rows=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 400


def test_labels_of_a_crowd_tell_strangers_apart_and_count_them(crowd):
    for scene in crowd[:50]:
        row = {"background": scene.background, "width": scene.width, "height": scene.height}
        row["objects"] = [{"kind": thing.kind, "box": thing.box} for thing in scene.objects]
        patches, whole = vision.patch_labels(row)
        counts = scene.counts()
        named = {vision.NAMES[name - 1]: number + 1 for name, number, *_, centre in patches.tolist() if centre}
        assert named.items() <= counts.items() and len(named) >= len(counts) - 1  # two centres may share a patch
        assert whole[1:].tolist() == [counts.get(kind, 0) for kind in texts.KINDS]
